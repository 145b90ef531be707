// Kernels for AVX-512 with bf16, and AMX tiles for products with a bf16 table.
#include <math.h>
#include <stdint.h>

#include "types.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")
#define ENTRGI_AMX
#define ENTRGI_LEVEL 3
#define ENTRGI_ISA amx
#define ENTRGI_ISA_NAME "amx"
#include "kernels.h"
#pragma GCC pop_options

const entrgi::Kernels* entrgi::kernels_amx() { return &entrgi::amx::table; }
#else
const entrgi::Kernels* entrgi::kernels_amx() { return nullptr; }
#endif
