// Facts about the build, and the choice of the instruction set; operators are registered in ops.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"

namespace {

std::vector<std::string> names(const char* const* (*list)(int*)) {
  int count = 0;
  const char* const* all = list(&count);
  return std::vector<std::string>(all, all + count);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native CPU kernels of entrgi_kernels: build facts. Importing it registers torch.ops.entrgi_native.";
  m.attr("INTERFACE") = 3;  // of the operators: counted up when a signature changes, here and in native.py
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiled_isas"] = names(entrgi::compiled_isas);
        info["supported_isas"] = names(entrgi::supported_isas);
        info["isa"] = std::string(entrgi::kernels().name);
#if defined(__VERSION__)
        info["compiler"] = std::string(__VERSION__);
#endif
        info["cplusplus"] = static_cast<long>(__cplusplus);
#if defined(_OPENMP)
        info["openmp"] = static_cast<long>(_OPENMP);
#else
        info["openmp"] = 0L;
#endif
#if defined(__SANITIZE_ADDRESS__)
        info["sanitizer"] = "address";
#else
        info["sanitizer"] = "";
#endif
        return info;
      },
      "Compiler, instruction sets compiled in, those this machine can run, and the one in use.");
  m.def(
      "set_isa",
      [](const std::string& name) {
        if (!entrgi::set_isa(name.c_str())) throw std::invalid_argument("this machine cannot run '" + name + "'");
      },
      pybind11::arg("name"),
      "Force an instruction set ('baseline', 'avx2', 'avx512', 'avx512_bf16', 'amx'), or '' for the best; for tests. Raises ValueError.");
}
