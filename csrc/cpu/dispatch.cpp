#include "dispatch.h"

#include <string.h>

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace entrgi {
namespace {

// The operating system must grant a process the tile registers before their first use; asking twice is harmless, and
// oneDNN asks for itself.
bool tiles_granted() {
#if defined(ENTRGI_SOFTWARE_TILES)
  return true;
#elif defined(__x86_64__) && defined(__linux__)
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}

bool cpu_has_avx512_bf16() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
#else
  return false;
#endif
}

bool cpu_has_amx_bf16() {
#if defined(ENTRGI_SOFTWARE_TILES)
  return true;
#elif defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = d & (1u << 24), bf16_tiles = d & (1u << 22);
  return tile && bf16_tiles;
#else
  return false;
#endif
}

struct Found {
  const Kernels* tables[5];
  const char* supported[5];
  const char* compiled[5];
  int supported_count = 0, compiled_count = 0;

  void add(const Kernels* table, bool runs) {
    if (!table) return;
    compiled[compiled_count++] = table->name;
    if (!runs) return;
    tables[supported_count] = table;
    supported[supported_count++] = table->name;
  }
  Found() {
    bool avx2 = false, avx512 = false;
#if defined(__x86_64__)
    __builtin_cpu_init();  // libgcc's check includes what the operating system saves (xgetbv)
    avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt");
    avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    const bool bf16 = avx512 && cpu_has_avx512_bf16();
    add(kernels_amx, bf16 && cpu_has_amx_bf16() && tiles_granted());
    add(kernels_avx512_bf16, bf16);
    add(kernels_avx512, avx512);
    add(kernels_avx2, avx2);
    add(kernels_baseline, true);
  }
};

const Found& found() {
  static const Found f;
  return f;
}

std::atomic<const Kernels*> forced{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* k = forced.load(std::memory_order_relaxed);
  return k ? *k : *found().tables[0];
}

bool set_isa(const char* name) {
  if (!name[0]) {
    forced.store(nullptr);
    return true;
  }
  for (int i = 0; i < found().supported_count; i++)
    if (!strcmp(found().supported[i], name)) {
      forced.store(found().tables[i]);
      return true;
    }
  return false;
}

const char* const* supported_isas(int* count) {
  *count = found().supported_count;
  return found().supported;
}

const char* const* compiled_isas(int* count) {
  *count = found().compiled_count;
  return found().compiled;
}

}  // namespace entrgi
