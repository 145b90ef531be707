// Products with a bfloat16 table: 16 x 32 bf16 operands, float accumulators, multiplied by `tiles` of tiles_amx.h or
// tiles_dot.h. Included inside namespace entrgi::ENTRGI_ISA, after the plain kernels, whose epilogues it uses.
//
// forward   p enters as bf16 terms as it is produced: one under 16-bit logits, which it rounds as torch's product would;
//           three under float logits, which hold all its 24 bits. E is interleaved in pairs of rows (what a B operand
//           wants) into an L2-sized block. The interleaving works within 128-bit lanes, so the accumulator's columns are permuted;
//           LaneOrder undoes that when the splits are added.
// table     dE = p^T grad, where logits, grad and dE have 16 bits: p is transposed into A tiles, grad interleaved as E above.
// backward  G^T = E grad^T: rows of E are A operands as they lie in memory, or copied into whole tiles where several tiles of
//           the gradient meet them; grad is packed once.
// Both prefetch what the next step reads while the tiles work: at few rows the table's bytes are what takes the time.

// What the accumulators are before the first product.
enum class Start { keep, clear, load };

#if defined(ENTRGI_AMX)
#include "tiles_amx.h"
#else
#include "tiles_dot.h"
#endif

// --- forward ----------------------------------------------------------------------------------------------------------
INLINE int64_t tiled_terms(const ForwardJob& job) { return job.logits.dtype == Dtype::f32 ? 3 : 1; }
// Three terms are added block by block, so that a block's length is seen in the bits: it must not follow the groups, whose number
// is that of the threads. One term goes on where the block before ended.
INLINE int64_t tiled_forward_block(const ForwardJob& job) {
  const int64_t whole = round_up(job.d, 32);
  const int64_t columns = tiled_terms(job) == 1 ? ceil_div(whole, job.groups) : whole < 1024 ? whole : 1024;
  const int64_t bytes = (job.n < 128 ? 256 : 768) << 10;
  const int64_t fit = bytes / (columns * 2) / 32 * 32;
  return fit < 32 ? 32 : fit > 512 ? 512 : fit;
}
static void tiled_forward_padding(const ForwardJob& job, int64_t* rows, int64_t* columns) {
  *rows = round_up(job.n, 16);
  *columns = round_up(job.d, 32);
}
// A panel's bytes; 64 more than its tiles, so that writing a row of E does not hit one L1 set over and over.
INLINE int64_t tiled_panel(int64_t block) { return block / 32 * 2048 + 64; }
static int64_t tiled_forward_scratch(const ForwardJob& job) {
  const int64_t block = tiled_forward_block(job), rows = round_up(job.n < FORWARD_ROWS ? job.n : FORWARD_ROWS, 16);
  return round_up(job.d, 32) / 32 * tiled_panel(block) + tiled_terms(job) * rows * block * 2 + 128;
}

// Rows of E in pairs, into panels of 32 columns: [panel][k / 32][even lanes, odd lanes][16 pairs][64 bytes]
static void tiled_pack(const bf16* x, int64_t stride, int64_t depth, int64_t columns, char* out, int64_t panel) {
  const int64_t padded = round_up(depth, 32);
  for (int64_t k = 0; k < padded; k += 2) {
    const bf16 *even = x + k * stride, *odd = even + stride;
    char* to = out + k / 32 * 2048 + k % 32 / 2 * 64;
    for (int64_t c = 0; c < columns; c += 32, to += panel) {
      const __mmask32 mask = columns - c >= 32 ? 0xffffffffu : (1u << (columns - c)) - 1;
      __m512i a = k < depth ? _mm512_maskz_loadu_epi16(mask, even + c) : _mm512_setzero_si512();
      __m512i b = k + 1 < depth ? _mm512_maskz_loadu_epi16(mask, odd + c) : _mm512_setzero_si512();
      _mm512_store_si512((__m512i*)to, _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512((__m512i*)(to + 1024), _mm512_unpackhi_epi16(a, b));
    }
  }
}

// One row of p as TERMS bf16 numbers that add up to it, into A tiles [term][k / 32][16 rows][64 bytes], terms `term` bytes
// apart; zero beyond `count`.
template <typename T, int TERMS>
INLINE void tiled_probability_row(const T* x, int64_t count, float top, float factor, Scale<float> scale, char* out,
                                int64_t term) {
  const vf s = set1(top), f = set1(factor);
  for (int64_t i = 0; i < count; i += 32, out += 1024) {
    vf p[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      const int64_t at = i + 16 * j, rest = count - at;
      const vf v = rest >= 16 ? load(x + at) : load_part(x + at, rest > 0 ? (int)rest : 0, -INFINITY);
      p[j] = vexp(scaled(v, s, scale)) * f;
    }
#pragma GCC unroll 3
    for (int t = 0; t < TERMS; t++) {
      const __m512i pair = (__m512i)_mm512_cvtne2ps_pbh((__m512)p[1], (__m512)p[0]);
      _mm512_store_si512((__m512i*)(out + t * term), pair);
      p[0] -= (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(pair)), 16);
      p[1] -= (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(pair, 1)), 16);
    }
  }
}

template <typename T>
static void tiled_forward(const ForwardJob& job, int64_t unit, void* scratch) {
  const int64_t split = unit / job.groups, group = unit % job.groups;
  const int64_t block = tiled_forward_block(job), columns = round_up(job.d, 32), n_padded = round_up(job.n, 16);
  constexpr int TERMS = __is_same(T, float) ? 3 : 1;  // tiled_terms
  const int64_t panel = tiled_panel(block), term = block / 32 * 1024, tile_row = TERMS * term;  // bytes of 16 rows of p
  int64_t v0, v1, d0, d1;
  part_of(job.v, 512, job.splits, split, &v0, &v1);
  part_of(job.d, 32, job.groups, group, &d0, &d1);
  const int64_t panels = ceil_div(d1 - d0, 32), size = (int64_t)sizeof(T);
  char* packed = (char*)scratch;
  char* p = packed + panels * panel;
  float* c = (float*)job.accumulators + split * n_padded * columns + d0;
  for (int64_t n = 0; n < n_padded; n++) __builtin_memset(c + n * columns, 0, 4 * panels * 32);
  const Scale<float> scale = reciprocal<float>(job.temperature);
  const bf16* table = (const bf16*)job.embedding.data + d0;
  const T* logits = (const T*)job.logits.data;
  tiles_begin();
  for (int64_t v = v0; v < v1; v += block) {
    const int64_t depth = v1 - v < block ? v1 - v : block, steps = ceil_div(depth, 32);
    const int64_t after = v + block, next = after >= v1 ? 0 : v1 - after < block ? v1 - after : block;
    tiled_pack(table + v * job.embedding.stride, job.embedding.stride, depth, d1 - d0, packed, panel);
    for (int64_t n0 = 0; n0 < job.n; n0 += FORWARD_ROWS) {
      const int64_t rows = job.n - n0 < FORWARD_ROWS ? job.n - n0 : FORWARD_ROWS, row_tiles = ceil_div(rows, 16);
      for (int64_t r = 0; r < rows; r++)
        tiled_probability_row<T, TERMS>(
            logits + (n0 + r) * job.logits.stride + v, depth, ((const float*)job.maximum)[n0 + r],
            1.0f / ((const float*)job.total)[n0 + r], scale, p + r / 16 * tile_row + r % 16 * 64, term);
      Prefetcher ahead;
      ahead.list[0].set(logits + n0 * job.logits.stride + after, job.logits.stride * size, next * size, next ? rows : 0);
      if (n0 == 0)
        ahead.list[1].set(table + after * job.embedding.stride, job.embedding.stride * 2, (d1 - d0) * 2, next);
      ahead.start(panels * ceil_div(row_tiles, 2) * TERMS * steps);
      for (int64_t j = 0; j < panels; j++)
        for (int64_t i = 0; i < row_tiles; i += 2) {
          float* to = c + (n0 + 16 * i) * columns + 32 * j;
          const char *a = p + i * tile_row, *b = packed + j * panel;
          for (int t = 0; t < TERMS; t++) {  // the sum of the terms stays in the tile registers
            const Start start = t == 0 ? Start::load : Start::keep;
            const bool write = t + 1 == TERMS;
            if (i + 1 < row_tiles)
              tiles<2, 2>(a + t * term, tile_row, 1024, 64, b, 1024, 2048, steps, to, columns, start, write, &ahead);
            else
              tiles<1, 2>(a + t * term, tile_row, 1024, 64, b, 1024, 2048, steps, to, columns, start, write, &ahead);
          }
        }
    }
  }
  tiles_end();
}
static void tiled_forward_unit(const ForwardJob& job, int64_t unit, void* scratch) {
  switch (job.logits.dtype) {
    case Dtype::f32: return tiled_forward<float>(job, unit, scratch);
    case Dtype::bf16: return tiled_forward<bf16>(job, unit, scratch);
    case Dtype::f16: return tiled_forward<f16>(job, unit, scratch);
    case Dtype::f64: return;
  }
}

struct LaneOrder {  // column -> place in the accumulator, see tiled_pack
  int64_t operator()(int64_t d) const { return (d & ~31ll) + ((d & 4) << 2) + ((d & 24) >> 1) + (d & 3); }
};
static void tiled_forward_combine(const ForwardJob& job, int64_t begin, int64_t end) {
  combine_any<float>(job, begin, end, round_up(job.n, 16), round_up(job.d, 32), LaneOrder());
}

// --- backward ---------------------------------------------------------------------------------------------------------
// A gradient that is not bf16 goes in as the sum of bf16 terms: two hold the 11 bits of float16, three the 24 of float.
INLINE int64_t tiled_terms(const BackwardJob& job) {
  return job.grad.dtype == Dtype::bf16 ? 1 : job.grad.dtype == Dtype::f16 ? 2 : 3;
}
static int64_t tiled_gradient_pack_size(const BackwardJob& job) {
  return tiled_terms(job) * round_up(job.n, 16) * round_up(job.d, 32) * 2;
}

// [tile of n][term][d / 32][16 pairs of d][16 n x 2]
template <typename T>
static void tiled_pack_rows(const T* x, int64_t stride, int64_t n, int64_t d, int64_t terms, uint16_t* out) {
  const int64_t columns = round_up(d, 32), tile = columns * 16;
  __builtin_memset(out, 0, (size_t)(terms * round_up(n, 16) * columns * 2));
  for (int64_t r = 0; r < n; r++)
    for (int64_t k = 0; k < d; k++) {
      float rest = (float)to_acc(x[r * stride + k]);
      uint16_t* to = out + r / 16 * terms * tile + k / 2 * 32 + r % 16 * 2 + k % 2;
      for (int64_t t = 0; t < terms; t++, to += tile) {
        bf16 term;
        from_acc(rest, &term);
        *to = term.bits;
        rest -= to_acc(term);
      }
    }
}
static void tiled_pack_gradient(const BackwardJob& job) {
  const void* x = job.grad.data;
  const int64_t s = job.grad.stride, terms = tiled_terms(job);
  uint16_t* out = (uint16_t*)job.packed;
  switch (job.grad.dtype) {
    case Dtype::f64: return tiled_pack_rows((const double*)x, s, job.n, job.d, terms, out);
    case Dtype::f32: return tiled_pack_rows((const float*)x, s, job.n, job.d, terms, out);
    case Dtype::bf16: return tiled_pack_rows((const bf16*)x, s, job.n, job.d, terms, out);
    case Dtype::f16: return tiled_pack_rows((const f16*)x, s, job.n, job.d, terms, out);
  }
}
// Steps of 32 columns that are taken at a time where rows of E meet several tiles of the gradient: both then stay in L1.
constexpr int64_t TILED_DEPTH = 11;
static int64_t tiled_backward_units(const BackwardJob& job) { return backward_units_any(job); }
static int64_t tiled_backward_scratch(const BackwardJob& job) {
  const int64_t block = backward_block(job), rows = round_up(job.n < BACKWARD_ROWS ? job.n : BACKWARD_ROWS, 16);
  return (2 * block * rows + 64) * 4 + block * round_up(job.d, 32) * 2 + 128;
}

// 32 rows of E, `columns` of each, as tiles [2][columns / 32][16 rows][64 bytes], zero beyond the last.
static void tiled_tile_rows(const bf16* x, int64_t stride, int64_t rows, int64_t columns, char* out) {
  const int64_t steps = ceil_div(columns, 32);
  for (int64_t r = 0; r < 32; r++) {
    char* to = out + r / 16 * steps * 1024 + r % 16 * 64;
    for (int64_t k = 0; k < columns; k += 32, to += 1024) {
      const __mmask32 mask = columns - k >= 32 ? 0xffffffffu : (1u << (columns - k)) - 1;
      const __m512i line = _mm512_maskz_loadu_epi16(r < rows ? mask : 0, x + r * stride + k);
      _mm512_store_si512((__m512i*)to, line);
    }
  }
}

template <typename T>
static void tiled_backward(const BackwardJob& job, int64_t unit, void* scratch) {
  const int64_t block = backward_block(job), v0 = unit * block, count = job.v - v0 < block ? job.v - v0 : block;
  const int64_t most = job.n < BACKWARD_ROWS ? job.n : BACKWARD_ROWS, ldg = round_up(most, 16);
  const int64_t columns = round_up(job.d, 32), steps = columns / 32, terms = tiled_terms(job), tile = columns * 32;
  float* gt = (float*)scratch;   // [block][ldg]
  float* g = gt + block * ldg;   // [ldg][block]
  char* packed = (char*)(g + ldg * block + 64);  // tiled_tile_rows
  const bf16* table = (const bf16*)job.embedding.data + v0 * job.embedding.stride;
  tiles_begin();
  for (int64_t n0 = 0; n0 < job.n; n0 += BACKWARD_ROWS) {
    const int64_t rows = job.n - n0 < BACKWARD_ROWS ? job.n - n0 : BACKWARD_ROWS, row_tiles = ceil_div(rows, 16);
    const char* b = (const char*)job.packed + n0 / 16 * terms * tile;
    // What the tile's own rows of E and its epilogue will read, spread over all of its products.
    Prefetcher ahead;
    if (n0 == 0 && count > 32)
      ahead.list[0].set(table + 32 * job.embedding.stride, job.embedding.stride * 2, job.d * 2, count - 32);
    ahead_of_epilogue<T>(job, n0, rows, v0, count, &ahead);
    ahead.start(ceil_div(count, 32) * ceil_div(row_tiles, 2) * terms * steps);
    for (int64_t r = 0; r < count; r += 32) {
      const int64_t height = count - r < 32 ? count - r : 32;
      // Few tiles of the gradient read E where it lies, unless it lacks a part of a tile.
      const bool packs = ldg > 64 || height < 32 || columns != job.d;
      const int64_t chunk = ldg > 64 ? TILED_DEPTH : steps;
      for (int64_t k = 0; k < steps; k += chunk) {
        const int64_t depth = steps - k < chunk ? steps - k : chunk, left = job.d - 32 * k;
        const bf16* rows_of_e = table + r * job.embedding.stride + 32 * k;
        char* whole = packed + (r / 32 * steps + k) * 2048;
        if (packs && n0 == 0)
          tiled_tile_rows(rows_of_e, job.embedding.stride, height, left < 32 * depth ? left : 32 * depth, whole);
        const char* a = packs ? whole : (const char*)rows_of_e;
        const int64_t a_row = packs ? 64 : job.embedding.stride * 2, a_step = packs ? 1024 : 64;
        const int64_t a_tile = packs ? depth * 1024 : 16 * a_row;
        for (int64_t i = 0; i < row_tiles; i += 2)
          for (int64_t t = 0; t < terms; t++) {
            const char* right = b + (i * terms + t) * tile + k * 1024;
            float* c = gt + r * ldg + 16 * i;
            const Start start = t > 0 ? Start::keep : k > 0 ? Start::load : Start::clear;
            const bool write = t + 1 == terms;
            if (i + 1 < row_tiles)
              tiles<2, 2>(a, a_tile, a_step, a_row, right, terms * tile, 1024, depth, c, ldg, start, write, &ahead);
            else
              tiles<2, 1>(a, a_tile, a_step, a_row, right, terms * tile, 1024, depth, c, ldg, start, write, &ahead);
          }
      }
    }
    transpose(gt, ldg, round_up(count, 16), round_up(rows, 16), g, block);
    epilogue<T>(job, n0, rows, v0, count, g, block);
  }
  tiles_end();
}
static void tiled_backward_unit(const BackwardJob& job, int64_t unit, void* scratch) {
  switch (job.logits.dtype) {
    case Dtype::f32: return tiled_backward<float>(job, unit, scratch);
    case Dtype::bf16: return tiled_backward<bf16>(job, unit, scratch);
    case Dtype::f16: return tiled_backward<f16>(job, unit, scratch);
    case Dtype::f64: return;
  }
}

// --- gradient of the table --------------------------------------------------------------------------------------------
// p^T grad, 32 rows of the table a unit: p is transposed on its way into A tiles, grad packed once as E is in the forward.
constexpr int64_t TILED_TABLE_DEPTH = 512;  // rows (n) per step
static int64_t tiled_table_pack_size(const TableJob& job) {
  return round_up(job.d, 32) / 32 * tiled_panel(round_up(job.n, 32)) + 128;
}
static void tiled_pack_table(const TableJob& job) {
  tiled_pack((const bf16*)job.grad.data, job.grad.stride, job.n, job.d, (char*)job.packed, tiled_panel(round_up(job.n, 32)));
}
static int64_t tiled_table_units(const TableJob& job) { return ceil_div(job.v, 32); }
static int64_t tiled_table_scratch(const TableJob& job) {
  return 32 * round_up(job.d, 32) * 4 + 32 * TILED_TABLE_DEPTH * 2 + 16 * 32 * 4 + 128;
}

// Two rows of p, 32 entries each, as pairs: entry v's is in word v.
template <typename T>
INLINE void pair_row(const TableJob& job, int64_t n, int64_t v0, int64_t count, Scale<float> scale, float* out) {
  const vf none = zero<float>();
  vf p[2][2] = {{none, none}, {none, none}};
  for (int64_t r = 0; r < 2 && n + r < job.n; r++) {
    const T* x = (const T*)job.logits.data + (n + r) * job.logits.stride + v0;
    alignas(64) float row[32];
    const float shift = ((const float*)job.norm.shift)[n + r], rest = ((const float*)job.norm.rest)[n + r];
    probability_row<T, true>(x, count, shift, rest, scale, row, 32);
    p[r][0] = load(row);
    p[r][1] = load(row + 16);
  }
#pragma GCC unroll 2
  for (int h = 0; h < 2; h++) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)p[1][h], (__m512)p[0][h]);
    const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
    const __m512i second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
    _mm512_store_si512((__m512i*)(out + 16 * h), _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
  }
}

template <typename T>
static void tiled_table(const TableJob& job, int64_t unit, void* scratch) {
  const int64_t v0 = unit * 32, count = job.v - v0 < 32 ? job.v - v0 : 32;
  const int64_t columns = round_up(job.d, 32), panel = tiled_panel(round_up(job.n, 32));
  float* c = (float*)scratch;
  float* pairs = c + 32 * columns;
  char* p = (char*)(pairs + 16 * 32);
  const Scale<float> scale = reciprocal<float>(job.temperature);
  tiles_begin();
  for (int64_t n0 = 0; n0 < job.n; n0 += TILED_TABLE_DEPTH) {
    const int64_t depth = job.n - n0 < TILED_TABLE_DEPTH ? job.n - n0 : TILED_TABLE_DEPTH, steps = ceil_div(depth, 32);
    for (int64_t k = 0; k < steps; k++) {
      for (int64_t i = 0; i < 16; i++) pair_row<T>(job, n0 + 32 * k + 2 * i, v0, count, scale, pairs + 32 * i);
      for (int64_t h = 0; h < 2; h++) transpose16(pairs + 16 * h, 32, (float*)(p + (h * steps + k) * 1024), 16);
    }
    Prefetcher none;
    none.start(1);
    for (int64_t j = 0; j < columns / 32; j++)
      tiles<2, 2>(p, steps * 1024, 1024, 64, (const char*)job.packed + j * panel + n0 / 32 * 2048, 1024, 2048, steps,
                  c + 32 * j, columns, n0 ? Start::load : Start::clear, true, &none);
  }
  tiles_end();
  // Back into the order of columns, see tiled_pack: eighths of the two vectors in turn.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t r = 0; r < count; r++) {
    bf16* to = (bf16*)job.out.data + (v0 + r) * job.out.stride;
    for (int64_t d = 0; d < job.d; d += 32) {
      const float* from = c + r * columns + d;
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
      const __mmask32 mask = job.d - d >= 32 ? 0xffffffffu : (1u << (job.d - d)) - 1;
      _mm512_mask_storeu_epi16(to + d, mask, _mm512_permutexvar_epi64(order, both));
    }
  }
}
static void tiled_table_unit(const TableJob& job, int64_t unit, void* scratch) {
  if (job.logits.dtype == Dtype::f16) return tiled_table<f16>(job, unit, scratch);
  tiled_table<bf16>(job, unit, scratch);
}

// --- the unit's table --------------------------------------------------------------------------------------------------
// Jobs that the tiles do not serve, and all that is no product, are those of AVX-512.
INLINE bool tiled_serves(const TableJob& job) {  // of one term each
  const bool narrow = job.logits.dtype == Dtype::bf16 || job.logits.dtype == Dtype::f16;
  return narrow && job.grad.dtype == Dtype::bf16 && job.out.dtype == Dtype::bf16 && job.n >= TILED_ROWS;
}
template <typename Job>
INLINE bool tiled_serves(const Job& job) {
  return job.embedding.dtype == Dtype::bf16 && job.logits.dtype != Dtype::f64 && tiled_terms(job) <= TILED_TERMS &&
         job.n >= TILED_ROWS && job.d > 0;
}
#define ENTRGI_TILED_OR_PLAIN(name, ...) \
  return tiled_serves(job) ? tiled_##name(__VA_ARGS__) : kernels_avx512->name(__VA_ARGS__)

static void stats(const StatsJob& job, int64_t begin, int64_t end) { kernels_avx512->stats(job, begin, end); }
static int64_t filter_scratch(const SampleJob& job) { return kernels_avx512->filter_scratch(job); }
static void sample(const SampleJob& job, int64_t begin, int64_t end, void* scratch) {
  kernels_avx512->sample(job, begin, end, scratch);
}
static void confidence(const ConfidenceJob& job, int64_t begin, int64_t end, void* scratch) {
  kernels_avx512->confidence(job, begin, end, scratch);
}
static void entropy_backward(const EntropyBackwardJob& job, int64_t begin, int64_t end) {
  kernels_avx512->entropy_backward(job, begin, end);
}

static void forward_padding(const ForwardJob& job, int64_t* rows, int64_t* columns) {
  ENTRGI_TILED_OR_PLAIN(forward_padding, job, rows, columns);
}
static int64_t forward_scratch(const ForwardJob& job) { ENTRGI_TILED_OR_PLAIN(forward_scratch, job); }
static void forward_unit(const ForwardJob& job, int64_t unit, void* scratch) {
  // Too few rows for the tiles: the same rounded p, so that a row's precision does not depend on how many there are.
  if constexpr (TILED_ROWS > 1) {
    static_assert(TILED_ROWS <= FEW + 1);
    const bool few = job.n < TILED_ROWS && job.embedding.dtype == Dtype::bf16;
    if (few && job.logits.dtype == Dtype::bf16) return forward_unit_plain<bf16, true>(job, unit, scratch);
    if (few && job.logits.dtype == Dtype::f16) return forward_unit_plain<f16, true>(job, unit, scratch);
  }
  ENTRGI_TILED_OR_PLAIN(forward_unit, job, unit, scratch);
}
static void forward_combine(const ForwardJob& job, int64_t begin, int64_t end) {
  ENTRGI_TILED_OR_PLAIN(forward_combine, job, begin, end);
}
static int64_t gradient_pack_size(const BackwardJob& job) { ENTRGI_TILED_OR_PLAIN(gradient_pack_size, job); }
static void pack_gradient(const BackwardJob& job) { ENTRGI_TILED_OR_PLAIN(pack_gradient, job); }
static int64_t backward_units(const BackwardJob& job) { ENTRGI_TILED_OR_PLAIN(backward_units, job); }
static int64_t backward_scratch(const BackwardJob& job) { ENTRGI_TILED_OR_PLAIN(backward_scratch, job); }
static void backward_unit(const BackwardJob& job, int64_t unit, void* scratch) {
  ENTRGI_TILED_OR_PLAIN(backward_unit, job, unit, scratch);
}

static int64_t table_pack_size(const TableJob& job) { ENTRGI_TILED_OR_PLAIN(table_pack_size, job); }
static void pack_table(const TableJob& job) { ENTRGI_TILED_OR_PLAIN(pack_table, job); }
static int64_t table_units(const TableJob& job) { ENTRGI_TILED_OR_PLAIN(table_units, job); }
static int64_t table_scratch(const TableJob& job) { ENTRGI_TILED_OR_PLAIN(table_scratch, job); }
static void table_unit(const TableJob& job, int64_t unit, void* scratch) {
  ENTRGI_TILED_OR_PLAIN(table_unit, job, unit, scratch);
}
