// What every kernel needs: element types, ordered keys, wide reads of a row, reductions in a fixed order, the launch.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef ENTRGI_EMULATION
#include "cuda_emulation.h"  // the same kernels as plain C++, for tests on machines without a GPU
#else
#include <cuda_runtime.h>
#endif

#include "jobs.h"

#define DEVICE __device__ __forceinline__

namespace entrgi::cuda {

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int LANES = 32;
constexpr float LOG2E = 1.4426950408889634f;

// --- what CUDA and its emulation spell differently --------------------------------------------------------------------
#ifdef ENTRGI_EMULATION
inline float exp2_fast(float x) { return ::exp2f(x); }
inline float half_value(uint16_t bits) { return emulation::half_value(bits); }
inline uint16_t half_bits(float x) { return emulation::half_bits(x); }
template <typename S>
S& shared_memory() {
  return *static_cast<S*>(emulation::shared_memory(sizeof(S)));
}
#else
// One instruction, 2 ulp; results below the normal range are flushed to zero.
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float half_value(uint16_t bits) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  return y;
}
DEVICE uint16_t half_bits(float x) {
  uint16_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
template <typename S>
DEVICE S& shared_memory() {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  return *reinterpret_cast<S*>(shared_bytes);
}
namespace detail {
template <typename... P>
cudaError_t launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared, cudaStream_t stream, P... args) {
  if (shared > 48u << 10) {  // more than a kernel gets unasked
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(args...);
  return cudaGetLastError();
}
}  // namespace detail
#endif

// kernel<<<blocks, threads, shared, stream>>>(job); an empty grid is nothing to do, and more than 2^31 - 1 are refused.
template <typename Job>
cudaError_t launch(void (*kernel)(Job), int64_t blocks, int threads, size_t shared, cudaStream_t stream, Job job) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
#ifdef ENTRGI_EMULATION
  static_cast<void>(stream);
  return emulation::launch(kernel, blocks, threads, shared, job);
#else
  return detail::launch(kernel, blocks, threads, shared, stream, job);
#endif
}

// --- elements ---------------------------------------------------------------------------------------------------------
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

DEVICE float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}
DEVICE uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

// SHIFT: a float32 that came from a narrower type ends in this many zeros.
template <typename T>
struct Element;
template <>
struct Element<float> {
  static constexpr int SHIFT = 0;
  static DEVICE float load(float x) { return x; }
  static DEVICE float store(float x) { return x; }
  static DEVICE void unpack(const uint4& raw, float (&x)[4]) {
    x[0] = bits_float(raw.x), x[1] = bits_float(raw.y), x[2] = bits_float(raw.z), x[3] = bits_float(raw.w);
  }
};
template <>
struct Element<bf16> {
  static constexpr int SHIFT = 16;
  static DEVICE float load(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
  static DEVICE bf16 store(float x) {  // to nearest, ties to even; NaN stays NaN
    const uint32_t u = float_bits(x);
    return bf16{static_cast<uint16_t>(x != x ? 0x7fff : (u + 0x7fff + ((u >> 16) & 1)) >> 16)};
  }
  static DEVICE void unpack(const uint4& raw, float (&x)[8]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      x[2 * i] = bits_float(words[i] << 16);
      x[2 * i + 1] = bits_float(words[i] & 0xffff0000u);
    }
  }
};
template <>
struct Element<f16> {
  static constexpr int SHIFT = 13;
  static DEVICE float load(f16 x) { return half_value(x.bits); }
  static DEVICE f16 store(float x) { return f16{half_bits(x)}; }
  static DEVICE void unpack(const uint4& raw, float (&x)[8]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      x[2 * i] = half_value(static_cast<uint16_t>(words[i]));
      x[2 * i + 1] = half_value(static_cast<uint16_t>(words[i] >> 16));
    }
  }
};

template <typename T>
constexpr int WIDE = 16 / static_cast<int>(sizeof(T));  // entries in a 16-byte load

template <typename T>
DEVICE const T* row_of(const Rows& rows, int64_t row) {
  return static_cast<const T*>(rows.data) + row * rows.stride;
}

// Keys ordered like the values, without the bits that are zero in every value of type T; -0 and 0 share one.
template <typename T>
DEVICE uint32_t ordered_key(float x) {
  const uint32_t u = float_bits(x == 0.0f ? 0.0f : x);
  return ((u >> 31) ? ~u : u | 0x80000000u) >> Element<T>::SHIFT;
}
// The smallest float32 that has this key; -inf for its own key and for all below it, which no value has.
template <typename T>
DEVICE float key_value(uint32_t key) {
  if (key <= ordered_key<T>(-INFINITY)) return -INFINITY;
  const uint32_t u = key << Element<T>::SHIFT;
  return bits_float((u >> 31) ? u & 0x7fffffffu : ~u);
}

// --- reading a row ----------------------------------------------------------------------------------------------------
// f(x, index) for every entry of row[begin, end): x[0 .. WIDE) are the entries from `index` on, as float32; where fewer
// are left they are followed by -inf. The body is read in aligned 16-byte loads, UNROLL of them in flight a thread; at
// most WIDE - 1 entries before and after it are read singly. A thread meets its entries in a fixed order: rising, but for
// those single ones, which come last.
template <typename T, int THREADS, int UNROLL, typename F>
DEVICE void walk(const T* row, int32_t begin, int32_t end, const F& f) {
  constexpr int W = WIDE<T>;
  static_assert(THREADS >= 2 * (W - 1), "one thread for each single entry");
  const int thread = static_cast<int>(threadIdx.x);
  const int past = static_cast<int>((reinterpret_cast<uintptr_t>(row + begin) & 15) / sizeof(T));
  const int head = past == 0 ? 0 : (W - past < end - begin ? W - past : end - begin);
  const int32_t body = begin + head;
  const int32_t windows = (end - body) / W;
  const int32_t tail = body + windows * W;
  const uint4* wide = reinterpret_cast<const uint4*>(row + body);
  int32_t window = thread;
  if constexpr (UNROLL > 1) {
    for (; window + (UNROLL - 1) * THREADS < windows; window += UNROLL * THREADS) {
      uint4 raw[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; u++) raw[u] = wide[window + u * THREADS];
#pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        float x[W];
        Element<T>::unpack(raw[u], x);
        f(x, body + (window + u * THREADS) * W);
      }
    }
  }
  // What is left, and the single entry: one place for both, so that f is compiled once more and no oftener.
  int32_t single = thread < head ? begin + thread : tail + thread - head;
  if (single >= (thread < head ? body : end)) single = -1;
  while (window < windows || single >= 0) {
    float x[W];
    int32_t index;
    if (window < windows) {
      Element<T>::unpack(wide[window], x);
      index = body + window * W;
      window += THREADS;
    } else {
      x[0] = Element<T>::load(row[single]);
#pragma unroll
      for (int i = 1; i < W; i++) x[i] = -INFINITY;
      index = single;
      single = -1;
    }
    f(x, index);
  }
}

// --- reductions in a fixed order --------------------------------------------------------------------------------------
DEVICE int lane_of_thread() { return static_cast<int>(threadIdx.x) % LANES; }
DEVICE int warp_of_thread() { return static_cast<int>(threadIdx.x) / LANES; }

template <typename S>
DEVICE S shuffle_down(const S& value, int offset) {
  static_assert(sizeof(S) % 4 == 0, "words of 32 bits");
  constexpr int WORDS = sizeof(S) / 4;
  uint32_t words[WORDS];
  memcpy(words, &value, sizeof(S));
#pragma unroll
  for (int i = 0; i < WORDS; i++) words[i] = __shfl_down_sync(ALL_LANES, words[i], offset);
  S other;
  memcpy(&other, words, sizeof(S));
  return other;
}

// The merge of all threads' values, returned to all of them. `slots` [THREADS / 32] is shared memory that nothing else
// uses meanwhile; it may be used again at once.
template <int THREADS, typename S, typename F>
DEVICE S block_merge(S value, S* slots, const F& merge) {
#pragma unroll
  for (int offset = LANES / 2; offset > 0; offset /= 2) value = merge(value, shuffle_down(value, offset));
  if (lane_of_thread() == 0) slots[warp_of_thread()] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < THREADS / LANES; i++) value = merge(value, slots[i]);
    slots[0] = value;
  }
  __syncthreads();
  value = slots[0];
  __syncthreads();
  return value;
}

}  // namespace entrgi::cuda
