// Kernels for AVX-512 F/BW/DQ/VL (x86-64-v4).
#include <math.h>
#include <stdint.h>

#include "types.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")
#define ENTRGI_LEVEL 3
#define ENTRGI_ISA avx512
#define ENTRGI_ISA_NAME "avx512"
#include "kernels.h"
#pragma GCC pop_options

constinit const entrgi::Kernels* const entrgi::kernels_avx512 = &entrgi::avx512::table;
#else
constinit const entrgi::Kernels* const entrgi::kernels_avx512 = nullptr;
#endif
