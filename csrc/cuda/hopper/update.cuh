// grad @ table^T with the softmax gradient and Adam: the N x V gradient never exists.
//
// A block owns a multiprocessor and works through tiles of 128 rows x 192 vocabulary entries. One warp brings operands by
// the copy engine; two warp groups multiply, 64 rows each; six warps finish tiles: they take the sums over by way of
// shared memory, so that Adam's traffic runs while the next tile is multiplied. Two blocks of neighbouring rows form a
// cluster: each brings half of the table's tile for both. Sizes are those of `Tile`.
#pragma once
#include "maps.h"
#include "primitives.cuh"

namespace entrgi::cuda::hopper {
namespace {

constexpr int ROWS = 128, HALF_ROWS = ROWS / 2;
constexpr int THREADS = 4 * WARP_GROUP, LAUNCHED = 65536 / THREADS;  // registers a thread has at first

// A block's tile, and how it is worked through. Another tile is a structure that inherits from it and says what differs.
struct Tile {
  static constexpr int COLUMNS = 192, STAGES = 3;
  static constexpr int DEPTH = 64;  // entries of D a step
  // Warps that finish tiles: the third group's four and up to three of the fourth, whose last one brings the operands. Six took
  // the update at N = 1,024, D = 2,048 from 1.70 ms to 1.34 on an H100.
  static constexpr int FINISHERS = 6;
  static constexpr int AHEAD = 4;     // turns that loads of 16-bit moments are ahead of their use
  static constexpr int PREFETCH = 0;  // steps that the table's tiles are brought into the cache before they are copied
  static constexpr bool TOLD = false;  // whether the compiler sees that sums are in shared memory, and moments are not
  // Registers a thread: those who finish get more than at first only where others have given theirs.
  static constexpr int MULTIPLYING = 136, FINISHING = 120;
};

// What follows from a tile.
template <typename T>
struct Plan {
  static constexpr int GRAD_BYTES = ROWS * T::DEPTH * 2, TABLE_BYTES = T::COLUMNS * T::DEPTH * 2;
  // The fourth group only brings operands, and gives its registers to those who finish.
  static constexpr bool APART = T::FINISHERS == 4;
  static constexpr int BRINGING = APART ? 40 : T::FINISHING;
  // Lanes a row, of eight entries each; where the finishers do not make whole rows, lanes a piece of a row.
  static constexpr int LANES = 32 * T::FINISHERS % (T::COLUMNS / 8) == 0 ? T::COLUMNS / 8 : 8;
  static constexpr int PIECES = T::COLUMNS / 8 / LANES;  // of a row
  static constexpr int AT_ONCE = 32 * T::FINISHERS / LANES, TURNS = ROWS * PIECES / AT_ONCE;

  struct Shared {
    alignas(1024) unsigned char grad[T::STAGES][GRAD_BYTES];
    alignas(1024) unsigned char table[T::STAGES][TABLE_BYTES];
    alignas(1024) float sums[ROWS][T::COLUMNS];
    float2 row[ROWS];  // grad . soft and log-sum-exp, of the tile that is being finished
    uint64_t full[T::STAGES], empty[T::STAGES], summed[2], taken[2];
  };

  static_assert(T::FINISHERS >= 4 && T::FINISHERS < 8 && 2 * T::MULTIPLYING + T::FINISHING + BRINGING <= 4 * LAUNCHED);
  static_assert(LANES % 8 == 0 && 32 * T::FINISHERS % LANES == 0 && ROWS * PIECES % AT_ONCE == 0);
  static_assert(TURNS % (2 * T::AHEAD) == 0);
  static_assert(sizeof(Shared) + 1024 <= 227 << 10);
};

// Where chunk `chunk` (four float32) of a row of sums lies: rows of a fragment would meet in the same banks.
DEVICE int chunk_of(int row, int chunk) { return chunk ^ (row & 7); }

template <typename T>
struct Eight;  // eight neighbouring entries of a tensor
template <>
struct Eight<__nv_bfloat16> {
  uint4 raw;
  DEVICE void load(const __nv_bfloat16* from) { raw = __ldcs(reinterpret_cast<const uint4*>(from)); }
  DEVICE void unpack(float (&to)[8]) const {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) to[2 * i] = low(words[i]), to[2 * i + 1] = high(words[i]);
  }
  static DEVICE void store(__nv_bfloat16* to, const float (&x)[8]) {
    __stcs(reinterpret_cast<uint4*>(to), make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7])));
  }
};
template <>
struct Eight<float> {
  float4 a, b;
  DEVICE void load(const float* from) {
    a = __ldcs(reinterpret_cast<const float4*>(from));
    b = __ldcs(reinterpret_cast<const float4*>(from) + 1);
  }
  DEVICE void unpack(float (&to)[8]) const {
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
  }
  static DEVICE void store(float* to, const float (&x)[8]) {
    __stcs(reinterpret_cast<float4*>(to), make_float4(x[0], x[1], x[2], x[3]));
    __stcs(reinterpret_cast<float4*>(to) + 1, make_float4(x[4], x[5], x[6], x[7]));
  }
};

// What the epilogue reads of one row for a lane's eight entries. A row's two numbers are read with them: inside its turn they
// cost a tenth of the update, and too few loads in flight most of the rest (seen on an H100).
template <typename M, bool READS>
struct Fetched {
  Eight<__nv_bfloat16> logits;
  Eight<M> exp_avg, exp_avg_sq;
};

// Softmax gradient and Adam of this block's tiles, as their sums come: eight neighbouring entries a lane, so many rows at once.
template <typename T, int CLUSTER, typename M, bool READS, bool WRITES>
DEVICE void finish_tiles(typename Plan<T>::Shared& shared, const UpdateJob& job, int thread, uint32_t rank, int row_tiles,
                         int tiles, int clusters, int first_tile) {
  const int n = static_cast<int>(job.logits.rows), v = static_cast<int>(job.logits.columns);
  constexpr int LANES = Plan<T>::LANES, PIECES = Plan<T>::PIECES, AT_ONCE = Plan<T>::AT_ONCE, TURNS = Plan<T>::TURNS;
  constexpr int AHEAD = sizeof(M) == 2 || !READS ? T::AHEAD : T::AHEAD / 2;
  static_assert(TURNS / 2 % AHEAD == 0);
  const auto finishers_meet = [] { synchronize_threads<1, 32 * T::FINISHERS>(); };
  const int own = thread / LANES, lane = thread % LANES;
  const int swap = (lane >> 2) & 1;  // of a lane's two chunks of sums: lanes would meet in the same banks
  __nv_bfloat16* const logits = static_cast<__nv_bfloat16*>(job.logits.data);
  M* const exp_avg = static_cast<M*>(job.exp_avg.data);
  M* const exp_avg_sq = static_cast<M*>(job.exp_avg_sq.data);
  int phase = 0;
  for (int tile = first_tile; tile < tiles; tile += clusters, phase ^= 1) {
    const int tile_row = ((tile % row_tiles) * CLUSTER + static_cast<int>(rank)) * ROWS;
    const int tile_column = tile / row_tiles * T::COLUMNS + 8 * lane;
    // Beyond the tensor's edges nothing is read or written; v is a multiple of 8.
    const int rows = PIECES > 1 || tile_column < v ? min(ROWS, n - tile_row) : 0;
    const auto column_of = [&](int piece) { return tile_column + piece % PIECES * (8 * LANES); };
    Fetched<M, READS> fetched[AHEAD];
    auto fetch = [&](Fetched<M, READS>& f, int piece) {
      const int place = piece / PIECES, column = column_of(piece);
      if (place < rows && (PIECES == 1 || column < v)) {
        const int64_t row = tile_row + place;
        f.logits.load(logits + row * job.logits.stride + column);
        if (READS) {
          f.exp_avg.load(exp_avg + row * job.exp_avg.stride + column);
          f.exp_avg_sq.load(exp_avg_sq + row * job.exp_avg_sq.stride + column);
        }
      }
    };
#pragma unroll
    for (int i = 0; i < AHEAD; i++) fetch(fetched[i], AT_ONCE * i + own);
    finishers_meet();  // the rows of the tile before have been read
    if (thread < ROWS && tile_row + thread < n) {
      shared.row[thread] = make_float2(job.delta[tile_row + thread], job.lse[tile_row + thread]);
    }
    finishers_meet();
    wait(&shared.summed[0], phase);
#pragma unroll 1
    for (int first = 0; first < TURNS; first += AHEAD) {
      if (first == TURNS / 2) {
        arrive(&shared.taken[0]);
        wait(&shared.summed[1], phase);
      }
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        const int piece = AT_ONCE * (first + i) + own;
        const int place = piece / PIECES, column = column_of(piece);
        if (place < rows && (PIECES == 1 || column < v)) {
          const int chunk = 2 * (piece % PIECES * LANES + lane);
          const int64_t row = tile_row + place;
          const float4* const chunks = reinterpret_cast<const float4*>(shared.sums[place]);
          const float4 one = chunks[chunk_of(place, chunk + swap)], other = chunks[chunk_of(place, chunk + 1 - swap)];
          const float4 left = swap ? other : one, right = swap ? one : other;
          const float product[8] = {left.x, left.y, left.z, left.w, right.x, right.y, right.z, right.w};
          const float delta = shared.row[place].x, lse = shared.row[place].y;
          float x[8], m[8], s[8];
          fetched[i].logits.unpack(x);
          if (READS) {
            fetched[i].exp_avg.unpack(m);
            fetched[i].exp_avg_sq.unpack(s);
          }
#pragma unroll
          for (int j = 0; j < 8; j++) {
            const float p = exp2_fast((x[j] * job.inverse - lse) * LOG2E);
            const float g = p * (product[j] - delta) * job.inverse;
            m[j] = (READS ? job.beta1 * m[j] : 0.0f) + (1.0f - job.beta1) * g;
            s[j] = (READS ? job.beta2 * s[j] : 0.0f) + (1.0f - job.beta2) * g * g;
            x[j] -= __fdividef(job.step_size * m[j], sqrt_fast(s[j]) * job.root_correction + job.eps);
          }
          Eight<__nv_bfloat16>::store(logits + row * job.logits.stride + column, x);
          if (WRITES) {
            Eight<M>::store(exp_avg + row * job.exp_avg.stride + column, m);
            Eight<M>::store(exp_avg_sq + row * job.exp_avg_sq.stride + column, s);
          }
        }
        fetch(fetched[i], piece + AT_ONCE * AHEAD);
      }
    }
    arrive(&shared.taken[1]);
  }
}

template <typename T, int CLUSTER, typename M, bool READS, bool WRITES>
__global__ void __launch_bounds__(THREADS, 1)
    update_kernel(const __grid_constant__ CUtensorMap grad_map, const __grid_constant__ CUtensorMap table_map,
                  const __grid_constant__ UpdateJob job) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using P = Plan<T>;
  constexpr int COLUMNS = T::COLUMNS, STAGES = T::STAGES, DEPTH = T::DEPTH;
  auto& shared = shared_memory<typename P::Shared, T::TOLD>();
  const int group = threadIdx.x / WARP_GROUP, thread = threadIdx.x % WARP_GROUP;
  const uint32_t rank = cluster_rank<CLUSTER>();
  const int n = static_cast<int>(job.logits.rows), v = static_cast<int>(job.logits.columns);
  const int steps = static_cast<int>((job.grad.columns + DEPTH - 1) / DEPTH);
  // Tiles are dealt to clusters, rows fastest: a tile of the table serves all rows from the cache.
  const int row_tiles = (n + ROWS * CLUSTER - 1) / (ROWS * CLUSTER), column_tiles = (v + COLUMNS - 1) / COLUMNS;
  const int tiles = row_tiles * column_tiles, clusters = gridDim.x / CLUSTER, first_tile = blockIdx.x / CLUSTER;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      init_barrier(&shared.full[s], 1);
      init_barrier(&shared.empty[s], 2 * CLUSTER);
    }
    for (int half = 0; half < 2; half++) {
      init_barrier(&shared.summed[half], WARP_GROUP);
      init_barrier(&shared.taken[half], 32 * T::FINISHERS);
    }
    fence_barrier_init();
  }
  synchronize_cluster<CLUSTER>();

  if (group < 2) {  // multiplies
    if (T::MULTIPLYING > LAUNCHED) more_registers<T::MULTIPLYING>();
    else if (T::MULTIPLYING < LAUNCHED) fewer_registers<T::MULTIPLYING>();
    float sums[COLUMNS / 2];
    int slot = 0, phase = 0, turn = 0;
    const int warp = thread / 32, lane = thread % 32;
    for (int tile = first_tile; tile < tiles; tile += clusters, turn ^= 1) {
      for (int step = 0; step < steps; step++) {
        wait(&shared.full[slot], phase);
        begin_products();
#pragma unroll
        for (int k = 0; k < DEPTH / 16; k++) {
          const unsigned char* const a = shared.grad[slot] + group * HALF_ROWS * DEPTH * 2 + 32 * k;
          const unsigned char* const b = shared.table[slot] + 32 * k;
          product(sums, matrix<2 * DEPTH>(a, 16, 16 * DEPTH), matrix<2 * DEPTH>(b, 16, 16 * DEPTH), step > 0 || k > 0);
        }
        commit_products();
        // The step before has been read once at most this one is running.
        if (step > 0) {
          finish_products<1>();
          const int before = slot == 0 ? STAGES - 1 : slot - 1;
          if (thread < CLUSTER) {
            if (CLUSTER == 1) arrive(&shared.empty[before]);
            else arrive_at(&shared.empty[before], thread);
          }
        }
        if (++slot == STAGES) slot = 0, phase ^= 1;
      }
      finish_products<0>();
      const int before = slot == 0 ? STAGES - 1 : slot - 1;
      if (thread < CLUSTER) {
        if (CLUSTER == 1) arrive(&shared.empty[before]);
        else arrive_at(&shared.empty[before], thread);
      }
      pin(sums);
      wait(&shared.taken[group], turn ^ 1);
      if (T::TOLD) {  // four addresses and constants: the compiler would make two stores of half of the pairs
        const int row = group * HALF_ROWS + warp * 16 + lane / 4;
        uint32_t places[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          places[i] = shared_address(&shared.sums[row][4 * chunk_of(row, 2 * i + lane % 4 / 2) + lane % 2 * 2]);
        }
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++) {
#pragma unroll
          for (int h = 0; h < 2; h++) {
            store_pair(places[j % 4] + 4 * (32 * (j / 4) + 8 * h * COLUMNS), sums[4 * j + 2 * h], sums[4 * j + 2 * h + 1]);
          }
        }
      } else {
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++) {
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const int row = group * HALF_ROWS + warp * 16 + h * 8 + lane / 4, column = 8 * j + lane % 4 * 2;
            float* const to = &shared.sums[row][4 * chunk_of(row, column / 4) + column % 4];
            *reinterpret_cast<float2*>(to) = make_float2(sums[4 * j + 2 * h], sums[4 * j + 2 * h + 1]);
          }
        }
      }
      arrive(&shared.summed[group]);
    }
  } else if (P::APART && group == 2) {
    more_registers<T::FINISHING>();
    finish_tiles<T, CLUSTER, M, READS, WRITES>(shared, job, thread, rank, row_tiles, tiles, clusters, first_tile);
  } else {
    if (P::BRINGING < LAUNCHED) fewer_registers<P::BRINGING>();
    const int other = threadIdx.x - 2 * WARP_GROUP;
    if (other == 2 * WARP_GROUP - 32) {  // brings the operands
      prefetch_map(&grad_map);
      prefetch_map(&table_map);
      int slot = 0, phase = 0;
      for (int tile = first_tile; tile < tiles; tile += clusters) {
        const int row = ((tile % row_tiles) * CLUSTER + static_cast<int>(rank)) * ROWS, column = tile / row_tiles * COLUMNS;
        for (int step = 0; step < steps; step++) {
          wait(&shared.empty[slot], phase ^ 1);
          expect_bytes(&shared.full[slot], P::GRAD_BYTES + P::TABLE_BYTES);
          copy_tile(shared.grad[slot], &grad_map, step * DEPTH, row, &shared.full[slot]);
          constexpr int SHARE = COLUMNS / CLUSTER;
          if (CLUSTER == 1) {
            copy_tile(shared.table[slot], &table_map, step * DEPTH, column, &shared.full[slot]);
          } else {
            copy_tile_to(shared.table[slot] + rank * (P::TABLE_BYTES / CLUSTER), &table_map, step * DEPTH,
                         column + static_cast<int>(rank) * SHARE, &shared.full[slot], (1 << CLUSTER) - 1);
          }
          if (T::PREFETCH > 0) {  // by those of the first rows, for all rows
            const int then = step + T::PREFETCH < steps ? step + T::PREFETCH : step + T::PREFETCH - steps;
            const int later = then > step ? tile : tile + clusters;
            if (later < tiles && later % row_tiles == 0) {
              prefetch_tile(&table_map, then * DEPTH, later / row_tiles * COLUMNS + static_cast<int>(rank) * SHARE);
            }
          }
          if (++slot == STAGES) slot = 0, phase ^= 1;
        }
      }
    } else if (!P::APART && other < 32 * T::FINISHERS) {
      finish_tiles<T, CLUSTER, M, READS, WRITES>(shared, job, other, rank, row_tiles, tiles, clusters, first_tile);
    }
    __syncwarp();
  }
  synchronize_cluster<CLUSTER>();  // a block must not end while its neighbour still copies into it or arrives at it
#endif
}

template <typename T, int CLUSTER, typename M, bool READS, bool WRITES>
cudaError_t launch(const UpdateJob& job, int multiprocessors, cudaStream_t stream) {
  CUtensorMap grad, table;
  cudaError_t error = make_map(&grad, job.grad, ROWS, T::DEPTH);
  if (error == cudaSuccess) error = make_map(&table, job.table, T::COLUMNS / CLUSTER, T::DEPTH);
  if (error != cudaSuccess) return error;
  return launch_clusters(update_kernel<T, CLUSTER, M, READS, WRITES>, multiprocessors / CLUSTER * CLUSTER, THREADS, CLUSTER,
                         sizeof(typename Plan<T>::Shared) + 1024, stream, grad, table, job);
}

}  // namespace
}  // namespace entrgi::cuda::hopper
