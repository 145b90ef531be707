// softmax(logits / temperature) @ table, the probabilities being formed in registers as the product's left operand.
//
// A block makes 128 rows x 256 columns of one slice of the vocabulary. One warp brings tiles of logits and of the table by the
// copy engine; two warp groups, 64 rows each, turn logits into probabilities and multiply: while one step's products run, the
// next step's probabilities are formed in other registers. A step's registers are written again only after its products
// have been waited for. A cluster is SLICES blocks, one a slice, whose sums are added in shared memory before they are written:
// where rows are few, many slices then cost little memory.
//
// With PAIRS = 2 two blocks of neighbouring rows bring the table's tile for each other. On an H100 that was slower, 2.10 ms for 1.83
// at N = 2,048, D = 2,048. It waits to be measured again (candidates.cu): without it blocks read 8 TB/s from the cache, which may be
// all that there is.
#include "maps.h"
#include "primitives.cuh"

namespace entrgi::cuda::hopper {
namespace {

constexpr int ROWS = 128, COLUMNS = 256, DEPTH = 64, STAGES = 4;
constexpr int THREADS = 3 * WARP_GROUP;
constexpr int LOGITS_BYTES = ROWS * DEPTH * 2, TABLE_BYTES = COLUMNS * DEPTH * 2, BOX_BYTES = 64 * DEPTH * 2;

struct Shared {
  alignas(1024) unsigned char logits[STAGES][LOGITS_BYTES];
  alignas(1024) unsigned char table[STAGES][TABLE_BYTES];  // four boxes of 64 columns
  uint64_t full[STAGES], empty[STAGES];
};

// Probabilities of two neighbouring entries: exp2((x - maximum) * scale + offset). Beyond the vocabulary x is 0, and so is
// the table: any finite p adds nothing there, so differences stop at 0.
DEVICE uint32_t probabilities(uint32_t pair, float maximum, float scale, float offset) {
  const float a = exp2_fast(fmaf(fminf(low(pair) - maximum, 0.0f), scale, offset));
  const float b = exp2_fast(fmaf(fminf(high(pair) - maximum, 0.0f), scale, offset));
  return pack(a, b);
}

// Where chunk `chunk` (four float32) of a row of sums lies: rows of a fragment would meet in the same banks.
DEVICE int chunk_of(int row, int chunk) { return chunk ^ (row & 7); }

template <int SLICES, int PAIRS>
__global__ void __launch_bounds__(THREADS, 1)
    forward_kernel(const __grid_constant__ CUtensorMap logits_map, const __grid_constant__ CUtensorMap table_map,
                   const __grid_constant__ ForwardJob job) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  Shared& shared = shared_memory<Shared>();
  const int group = threadIdx.x / WARP_GROUP, thread = threadIdx.x % WARP_GROUP;
  constexpr int CLUSTER = SLICES * PAIRS;
  static_assert(SLICES == 1 || PAIRS == 1);
  const int rank = static_cast<int>(cluster_rank<CLUSTER>()), slice_rank = PAIRS == 1 ? rank : 0;
  const int n = static_cast<int>(job.logits.rows), v = static_cast<int>(job.logits.columns);
  const int d = static_cast<int>(job.table.columns);
  // Rows vary fastest: blocks that run together read the same tiles of the table.
  const int row_tiles = PAIRS * ((n + ROWS * PAIRS - 1) / (ROWS * PAIRS)), column_tiles = (d + COLUMNS - 1) / COLUMNS;
  const int tile = blockIdx.x / SLICES;
  const int row = tile % row_tiles * ROWS;
  const int column = tile / row_tiles % column_tiles * COLUMNS, part = tile / row_tiles / column_tiles;
  const int split = part * SLICES + slice_rank;
  const int start = split * job.slice_length, end = min(start + job.slice_length, v);
  const int steps = max(0, (end - start + DEPTH - 1) / DEPTH);  // none where slices outnumber what there is
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      init_barrier(&shared.full[s], 1);
      init_barrier(&shared.empty[s], 2 * PAIRS);
    }
    fence_barrier_init();
  }
  synchronize_cluster<CLUSTER>();

  if (group == 2) {  // brings the operands
    fewer_registers<24>();
    if (thread == 0) {
      prefetch_map(&logits_map);
      prefetch_map(&table_map);
      int slot = 0, phase = 0;
      for (int step = 0; step < steps; step++) {
        wait(&shared.empty[slot], phase ^ 1);
        expect_bytes(&shared.full[slot], LOGITS_BYTES + TABLE_BYTES);
        const int first = start + step * DEPTH;
        copy_tile(shared.logits[slot], &logits_map, first, row, &shared.full[slot]);
        constexpr int BOXES = COLUMNS / 64 / PAIRS;
#pragma unroll
        for (int i = 0; i < BOXES; i++) {
          const int box = PAIRS == 1 ? i : rank * BOXES + i;
          unsigned char* const to = shared.table[slot] + box * BOX_BYTES;
          if (PAIRS == 1) copy_tile(to, &table_map, column + 64 * box, first, &shared.full[slot]);
          else copy_tile_to(to, &table_map, column + 64 * box, first, &shared.full[slot], (1 << PAIRS) - 1);
        }
        if (++slot == STAGES) slot = 0, phase ^= 1;
      }
    }
    __syncwarp();
    if constexpr (SLICES > 1) synchronize_cluster<SLICES>();  // sums are ready
  } else {
    more_registers<240>();
    const int warp = thread / 32, lane = thread % 32;
    float sums[128];
    uint32_t left[2][DEPTH / 16][4];  // of even and odd steps
    const float scale = job.inverse * LOG2E;
    const int own = row + group * 64 + warp * 16 + lane / 4;
    const int upper = min(own, n - 1), lower = min(own + 8, n - 1);
    const float maximum[2] = {job.maximum[upper], job.maximum[lower]};
    const float offset[2] = {-job.logsum[upper] * LOG2E, -job.logsum[lower] * LOG2E};
    // A lane's address in load_matrices: rows of 128 bytes whose 16-byte chunks are swizzled.
    const int tile_row = group * 64 + warp * 16 + lane % 16;
    const uint32_t row_bytes = tile_row * 128, swizzle = tile_row & 7, upper_chunk = lane / 16;
    int slot = 0, phase = 0;
    auto turn = [&](uint32_t (&a)[DEPTH / 16][4], int step) {
      wait(&shared.full[slot], phase);
      const uint32_t base = shared_address(shared.logits[slot]) + row_bytes;
#pragma unroll
      for (int k = 0; k < DEPTH / 16; k++) load_matrices(a[k], base + ((2 * k + upper_chunk) ^ swizzle) * 16);
#pragma unroll
      for (int k = 0; k < DEPTH / 16; k++) {
        a[k][0] = probabilities(a[k][0], maximum[0], scale, offset[0]);
        a[k][1] = probabilities(a[k][1], maximum[1], scale, offset[1]);
        a[k][2] = probabilities(a[k][2], maximum[0], scale, offset[0]);
        a[k][3] = probabilities(a[k][3], maximum[1], scale, offset[1]);
        begin_products();
        product_of_registers(sums, a[k], matrix<128>(shared.table[slot] + k * 16 * 128, BOX_BYTES, 1024), step > 0 || k > 0);
        commit_products();
      }
      if (step > 0) {
        finish_products<DEPTH / 16>();
        const int before = slot == 0 ? STAGES - 1 : slot - 1;
        if (PAIRS == 1) {
          if (thread == 0) arrive(&shared.empty[before]);
        } else if (thread < PAIRS) {
          arrive_at(&shared.empty[before], thread);
        }
      }
      if (++slot == STAGES) slot = 0, phase ^= 1;
    };
    for (int step = 0; step < steps; step += 2) {
      turn(left[0], step);
      if (step + 1 < steps) turn(left[1], step + 1);
    }
    finish_products<0>();
    pin(sums);
    float* const out = part == 0 ? job.soft : job.parts + static_cast<int64_t>(part - 1) * n * d;
    if constexpr (SLICES == 1) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int64_t place = own + 8 * h;
        if (place < n) {
#pragma unroll
          for (int j = 0; j < 32; j++) {
            const int to = column + 8 * j + lane % 4 * 2;
            if (to < d) {  // d is a multiple of 8
              *reinterpret_cast<float2*>(out + place * d + to) = make_float2(sums[4 * j + 2 * h], sums[4 * j + 2 * h + 1]);
            }
          }
        }
      }
    } else {
      // All tiles have come and been read once both warp groups are here: their memory takes the sums.
      synchronize_threads<1, 2 * WARP_GROUP>();
      float(*const staged)[COLUMNS] = reinterpret_cast<float(*)[COLUMNS]>(&shared);
      static_assert(sizeof(float) * ROWS * COLUMNS <= sizeof(shared.logits) + sizeof(shared.table));
#pragma unroll
      for (int j = 0; j < 32; j++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int place = group * 64 + warp * 16 + h * 8 + lane / 4, at = 8 * j + lane % 4 * 2;
          *reinterpret_cast<float2*>(&staged[place][4 * chunk_of(place, at / 4) + at % 4]) =
              steps > 0 ? make_float2(sums[4 * j + 2 * h], sums[4 * j + 2 * h + 1]) : make_float2(0, 0);
        }
      }
      synchronize_cluster<SLICES>();
      constexpr int SHARE = ROWS / SLICES, CHUNKS = COLUMNS / 4;
#pragma unroll 1
      for (int i = threadIdx.x; i < SHARE * CHUNKS; i += 2 * WARP_GROUP) {
        const int place = slice_rank * SHARE + i / CHUNKS, chunk = i % CHUNKS, to = column + 4 * chunk;
        if (row + place < n && to < d) {
          const uint32_t address = shared_address(&staged[place][4 * chunk_of(place, chunk)]);
          float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
          for (int slice = 0; slice < SLICES; slice++) {
            const float4 other = load_from(address, slice);
            sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
          }
          *reinterpret_cast<float4*>(out + static_cast<int64_t>(row + place) * d + to) = sum;
        }
      }
    }
  }
  // A block must not end while its neighbours still copy into it, arrive at it or read its sums.
  synchronize_cluster<CLUSTER>();
#endif
}

template <int SLICES, int PAIRS = 1>
cudaError_t launch(const ForwardJob& job, cudaStream_t stream) {
  CUtensorMap logits, table;
  cudaError_t error = make_map(&logits, job.logits, ROWS, DEPTH);
  if (error == cudaSuccess) error = make_map(&table, job.table, DEPTH, 64);
  if (error != cudaSuccess) return error;
  const int64_t row_tiles = (job.logits.rows + ROWS * PAIRS - 1) / (ROWS * PAIRS) * PAIRS;
  const int64_t tiles = row_tiles * ((job.table.columns + COLUMNS - 1) / COLUMNS);
  return launch_clusters(forward_kernel<SLICES, PAIRS>, tiles * job.parts_count * SLICES, THREADS, SLICES * PAIRS,
                         sizeof(Shared) + 1024, stream, logits, table, job);
}

}  // namespace

bool compiled() {
  // The driver would compile code for an older architecture anew: a kernel that does nothing.
  static const int version = [] {
    cudaFuncAttributes attributes = {};
    return cudaFuncGetAttributes(&attributes, forward_kernel<1, 1>) == cudaSuccess ? attributes.ptxVersion : 0;
  }();
  return version >= 90;
}

cudaError_t launch_forward(const ForwardJob& job, cudaStream_t stream) {
  if (job.logits.rows == 0) return cudaSuccess;
  switch (job.slices) {
    case 1: return launch<1>(job, stream);
    case 2: return launch<2>(job, stream);
    case 4: return launch<4>(job, stream);
    case 8: return launch<8>(job, stream);
  }
  return cudaErrorInvalidValue;
}

#ifdef ENTRGI_HOPPER_CANDIDATES
cudaError_t launch_forward_candidate(const ForwardJob& job, cudaStream_t stream) {
  if (job.logits.rows == 0) return cudaSuccess;
  return job.slices == 1 ? launch<1, 2>(job, stream) : cudaErrorInvalidValue;
}
#endif

}  // namespace entrgi::cuda::hopper
