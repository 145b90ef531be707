// csrc/cuda/hopper/primitives.cuh for a host compiler: the same functions, done by machine.cpp.
#pragma once
#include "cuda.h"

#define DEVICE inline

namespace entrgi::cuda::hopper {

constexpr int WARP_GROUP = 128;
constexpr float LOG2E = 1.4426950408889634f;

template <typename S, bool = false>
S& shared_memory() {
  return *reinterpret_cast<S*>((reinterpret_cast<uintptr_t>(emulation::dynamic_shared()) + 1023) & ~uintptr_t{1023});
}
inline uint32_t shared_address(const void* pointer) { return emulation::shared_address(pointer); }
inline void store_pair(uint32_t address, float x, float y) {
  const float pair[2] = {x, y};
  emulation::store_shared(address, pair, sizeof(pair));
}

#define init_barrier(barrier, arrivals) emulation::init_barrier(barrier, arrivals, #barrier)
inline void fence_barrier_init() {}
inline void arrive(uint64_t* barrier) { emulation::arrive(barrier, emulation::cluster_rank()); }
inline void arrive_at(uint64_t* barrier, uint32_t rank) { emulation::arrive(barrier, rank); }
inline void expect_bytes(uint64_t* barrier, uint32_t bytes) { emulation::expect_bytes(barrier, bytes); }
inline void wait(uint64_t* barrier, uint32_t parity) { emulation::wait(barrier, parity); }
template <int BARRIER, int THREADS>
void synchronize_threads() {
  static_assert(BARRIER > 0 && BARRIER < 16 && THREADS % 32 == 0);
  emulation::meet_block(BARRIER, THREADS);
}
template <int CLUSTER>
void synchronize_cluster() {
  if (CLUSTER > 1) emulation::meet_cluster();
  else emulation::meet_block(0, 0);
}
template <int CLUSTER>
uint32_t cluster_rank() {
  return CLUSTER == 1 ? 0 : emulation::cluster_rank();
}
inline float4 load_from(uint32_t address, uint32_t rank) {
  float4 x;
  emulation::load_remote(&x, address, rank, sizeof(x));
  return x;
}

inline void copy_tile(void* to, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  emulation::copy(to, *map, column, row, barrier, 1u << emulation::cluster_rank());
}
inline void copy_tile_to(void* to, const CUtensorMap* map, int column, int row, uint64_t* barrier, uint16_t blocks) {
  emulation::copy(to, *map, column, row, barrier, blocks);
}
inline void prefetch_tile(const CUtensorMap*, int, int) {}
inline void prefetch_map(const CUtensorMap*) {}

template <int COUNT>
void more_registers() {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256);
  emulation::set_registers(COUNT, true);
}
template <int COUNT>
void fewer_registers() {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256);
  emulation::set_registers(COUNT, false);
}

template <int BYTES>
emulation::Operand matrix(const void* tile, uint32_t leading, uint32_t stride) {
  return {shared_address(tile), leading, stride, BYTES, false};
}
inline void begin_products() { emulation::fence_registers(); }
inline void commit_products() { emulation::commit_products(); }
template <int PENDING>
void finish_products() {
  emulation::finish_products(PENDING);
}
template <int COUNT>
void pin(float (&)[COUNT]) {}
template <int COUNT>
void product(float (&sums)[COUNT], emulation::Operand a, emulation::Operand b, int add) {
  emulation::product(sums, COUNT, a, nullptr, b, add != 0);
}
inline void product_of_registers(float (&sums)[128], const uint32_t (&a)[4], emulation::Operand b, int add) {
  b.transposed = true;
  emulation::product(sums, 128, {}, a, b, add != 0);
}
inline void load_matrices(uint32_t (&to)[4], uint32_t address) { emulation::load_matrices(to, address); }

inline float exp2_fast(float x) { return ::exp2f(x); }
inline float sqrt_fast(float x) { return ::sqrtf(x); }
inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float value_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline float low(uint32_t pair) { return value_of(pair << 16); }
inline float high(uint32_t pair) { return value_of(pair & 0xffff0000u); }
inline uint32_t rounded(float x) {  // to bfloat16
  const uint32_t bits = bits_of(x);
  return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
inline uint32_t pack(float low, float high) {
  emulation::registers_written();
  return rounded(low) | rounded(high) << 16;
}

}  // namespace entrgi::cuda::hopper
