// Kernels for AVX2 with FMA and F16C (x86-64-v3).
#include <math.h>
#include <stdint.h>

#include "types.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")
#define ENTRGI_LEVEL 2
#define ENTRGI_ISA avx2
#define ENTRGI_ISA_NAME "avx2"
#include "kernels.h"
#pragma GCC pop_options

constinit const entrgi::Kernels* const entrgi::kernels_avx2 = &entrgi::avx2::table;
#else
constinit const entrgi::Kernels* const entrgi::kernels_avx2 = nullptr;
#endif
