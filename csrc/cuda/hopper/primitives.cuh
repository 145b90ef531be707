// What Hopper's products are made of, a function an instruction: barriers in shared memory, the copy engine (TMA), warp-group
// products (wgmma) and the hand-over of registers between warp groups. sm_90a only.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#define DEVICE __device__ __forceinline__

namespace entrgi::cuda::hopper {

constexpr int WARP_GROUP = 128;
constexpr float LOG2E = 1.4426950408889634f;

DEVICE uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// A block's dynamic shared memory. The launch gives S and 1,024 bytes: the copy engine's swizzles repeat after so many.
// TOLD: the compiler sees that it is shared memory. Else it takes accesses through S for such as may be of any memory.
template <typename S, bool TOLD = false>
DEVICE S& shared_memory() {
  extern __shared__ unsigned char raw_shared[];
  if (TOLD) return *reinterpret_cast<S*>(raw_shared + (-shared_address(raw_shared) & 1023));
  return *reinterpret_cast<S*>((reinterpret_cast<uintptr_t>(raw_shared) + 1023) & ~uintptr_t{1023});
}

// Two neighbouring float32 to shared memory, on 8 bytes, by one instruction.
DEVICE void store_pair(uint32_t address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}

// --- barriers ---------------------------------------------------------------------------------------------------------
// A barrier's phase ends when `arrivals` threads have arrived and all bytes that were announced have come. `wait` takes the
// parity of the phase whose end it waits for; of a fresh barrier the phase before (parity 1) counts as ended.
DEVICE void init_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}
DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives at the barrier of the same name in block `rank` of the cluster. Of the block's own scope, as what it says is that
// products have read a tile: a release to the cluster costs a fence of the whole GPU, at every step (seen on an H100).
DEVICE void arrive_at(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
DEVICE void expect_bytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
DEVICE void wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// Waits until THREADS threads of the block, whole warps, are here. BARRIER is 1 to 15.
template <int BARRIER, int THREADS>
DEVICE void synchronize_threads() {
  asm volatile("bar.sync %0, %1;" ::"n"(BARRIER), "n"(THREADS) : "memory");
}
template <int CLUSTER>
DEVICE void synchronize_cluster() {
  if (CLUSTER > 1) {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  } else {
    __syncthreads();
  }
}
template <int CLUSTER>
DEVICE uint32_t cluster_rank() {
  if (CLUSTER == 1) return 0;
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Four float32 at the place of `address` in block `rank` of the cluster.
DEVICE float4 load_from(uint32_t address, uint32_t rank) {
  float4 x;
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n}"
      : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
      : "r"(address), "r"(rank)
      : "memory");
  return x;
}

// --- the copy engine --------------------------------------------------------------------------------------------------
// Brings the map's box at (column, row) into shared memory; its bytes count towards `barrier`. What lies outside the
// tensor arrives as zeros, and counts.
DEVICE void copy_tile(void* to, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
// The same for every block of the cluster that `blocks` has a bit for: same place, same barrier in each.
DEVICE void copy_tile_to(void* to, const CUtensorMap* map, int column, int row, uint64_t* barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
}
// Brings the map's box into the second-level cache alone.
DEVICE void prefetch_tile(const CUtensorMap* map, int column, int row) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(map), "r"(column), "r"(row)
               : "memory");
}
DEVICE void prefetch_map(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// --- registers --------------------------------------------------------------------------------------------------------
template <int COUNT>
DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// --- warp-group products ----------------------------------------------------------------------------------------------
// Swizzles of a tile whose rows are `BYTES` wide, as the copy engine writes it.
template <int BYTES>
constexpr uint64_t SWIZZLE = BYTES == 128 ? 1 : BYTES == 64 ? 2 : 3;

// A matrix in shared memory. `leading` and `stride` are the distances in bytes of neighbouring 8-row groups, along the
// dimension that is not summed and along the summed one where rows of the tile run over the latter, and vice versa.
template <int BYTES>
DEVICE uint64_t matrix(const void* tile, uint32_t leading, uint32_t stride) {
  return static_cast<uint64_t>((shared_address(tile) & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | SWIZZLE<BYTES> << 62;
}

DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most PENDING groups are still running.
template <int PENDING>
DEVICE void finish_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from moving reads or writes of the sums across this point.
template <int COUNT>
DEVICE void pin(float (&sums)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(sums[i])::"memory");
}

#define ENTRGI_8(s, i) \
  "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3]), "+f"(s[i + 4]), "+f"(s[i + 5]), "+f"(s[i + 6]), "+f"(s[i + 7])
#define ENTRGI_32(s, i) ENTRGI_8(s, i), ENTRGI_8(s, i + 8), ENTRGI_8(s, i + 16), ENTRGI_8(s, i + 24)
#define ENTRGI_64(s) ENTRGI_32(s, 0), ENTRGI_32(s, 32)
#define ENTRGI_96(s) ENTRGI_64(s), ENTRGI_32(s, 64)
#define ENTRGI_128(s) ENTRGI_96(s), ENTRGI_32(s, 96)
#define ENTRGI_NAMES_64                                                                                                   \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,"  \
  "%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59," \
  "%60,%61,%62,%63"
#define ENTRGI_NAMES_96                                                                                                 \
  ENTRGI_NAMES_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88," \
  "%89,%90,%91,%92,%93,%94,%95"
#define ENTRGI_NAMES_128                                                                                                \
  ENTRGI_NAMES_96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116," \
  "%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// sums[64 x C] (+)= a[64 x 16] b[C x 16]^T, both from shared memory with rows that run over the summed dimension.
DEVICE void product(float (&sums)[64], uint64_t a, uint64_t b, int add) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" ENTRGI_NAMES_64 "}, %64, %65, add, 1, 1, 0, 0;\n}"
               : ENTRGI_64(sums)
               : "l"(a), "l"(b), "r"(add));
}
DEVICE void product(float (&sums)[96], uint64_t a, uint64_t b, int add) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %98, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {" ENTRGI_NAMES_96 "}, %96, %97, add, 1, 1, 0, 0;\n}"
               : ENTRGI_96(sums)
               : "l"(a), "l"(b), "r"(add));
}
// sums[64 x 256] (+)= a[64 x 16] b[16 x 256], a from registers, b from shared memory with rows that run over the 256.
DEVICE void product_of_registers(float (&sums)[128], const uint32_t (&a)[4], uint64_t b, int add) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %133, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" ENTRGI_NAMES_128
               "}, {%128,%129,%130,%131}, %132, add, 1, 1, 1;\n}"
               : ENTRGI_128(sums)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

// Four 8 x 8 matrices of 16-bit entries from shared memory, one address a lane (16 bytes there).
DEVICE void load_matrices(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float sqrt_fast(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float low(uint32_t pair) { return __uint_as_float(pair << 16); }
DEVICE float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
DEVICE uint32_t pack(float low, float high) {  // to nearest, ties to even
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

}  // namespace entrgi::cuda::hopper
