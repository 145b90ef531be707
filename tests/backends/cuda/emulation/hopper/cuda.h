// The CUDA names that csrc/cuda/hopper uses besides primitives.cuh, for a host compiler.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "machine.h"

#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

// --- the device's -----------------------------------------------------------------------------------------------------
template <unsigned (*FIND)()>
struct Indices {
  struct {
    operator unsigned() const { return FIND(); }
  } x;
};
constexpr Indices<emulation::thread_index> threadIdx{};
constexpr Indices<emulation::block_index> blockIdx{};
constexpr Indices<emulation::grid_size> gridDim{};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct __nv_bfloat16 {
  uint16_t bits;
};
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float __fdividef(float a, float b) { return a / b; }
inline void __syncwarp() { emulation::meet_warp(); }
template <typename T>
T __ldcs(const T* from) {
  emulation::touch(from, sizeof(T));
  return *from;
}
template <typename T>
void __stcs(T* to, T value) {
  emulation::touch(to, sizeof(T));
  *to = value;
}

// --- the runtime's and the driver's -----------------------------------------------------------------------------------
typedef int cudaError_t, CUresult;
typedef void* cudaStream_t;
typedef uint32_t cuuint32_t;
typedef uint64_t cuuint64_t;
typedef emulation::Map CUtensorMap;
enum : int { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNoKernelImageForDevice = 209 };
enum : int { cudaErrorLaunchFailure = 719, cudaErrorNotSupported = 801, cudaEnableDefault = 0 };
enum : int { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_64B = 64, CU_TENSOR_MAP_SWIZZLE_128B = 128 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

inline CUresult encode_map(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data, const cuuint64_t* sizes,
                           const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const bool allowed = rank == 2 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides[0] % 16 == 0 && box[1] >= 1 &&
                       box[0] * 2 <= static_cast<unsigned>(swizzle) && box[0] % 8 == 0 && box[1] <= 256 && steps[0] == 1 &&
                       steps[1] == 1;
  *map = {static_cast<const unsigned char*>(data), static_cast<int64_t>(sizes[0]), static_cast<int64_t>(sizes[1]),
          static_cast<int64_t>(strides[0]), static_cast<int>(box[0]), static_cast<int>(box[1]), static_cast<int>(swizzle)};
  return allowed ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** found, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* result) {
  *found = reinterpret_cast<void*>(&encode_map), *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct cudaFuncAttributes {
  int ptxVersion;
};
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  int id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int bytes) {
  return bytes <= 227 << 10 ? cudaSuccess : cudaErrorInvalidValue;
}
template <typename... P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), const P&... arguments) {
  const int cluster = config->numAttrs ? static_cast<int>(config->attrs[0].val.clusterDim.x) : 1;
  const bool done = emulation::launch([&] { kernel(arguments...); }, static_cast<int>(config->gridDim.x), cluster,
                                      static_cast<int>(config->blockDim.x), config->dynamicSmemBytes);
  return done ? cudaSuccess : cudaErrorLaunchFailure;
}
