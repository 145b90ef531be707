// AVX-512's kernels with products with a bf16 table by dot products of bf16 pairs.
#include <math.h>
#include <stdint.h>

#include "types.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")
#define ENTRGI_BF16
#define ENTRGI_LEVEL 3
#define ENTRGI_ISA avx512_bf16
#define ENTRGI_ISA_NAME "avx512_bf16"
#include "kernels.h"
#pragma GCC pop_options

constinit const entrgi::Kernels* const entrgi::kernels_avx512_bf16 = &entrgi::avx512_bf16::table;
#else
constinit const entrgi::Kernels* const entrgi::kernels_avx512_bf16 = nullptr;
#endif
