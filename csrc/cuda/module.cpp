// Facts about the build of entrgi_kernels._C_cuda; operators are registered in ops.cpp.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of entrgi_kernels: build facts. Importing it registers torch.ops.entrgi_cuda.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["cuda"] = CUDART_VERSION;
#if defined(__VERSION__)
        info["compiler"] = __VERSION__;
#endif
        return info;
      },
      "CUDA version (1000 major + 10 minor) and host compiler.");
}
