// Register-tiled matrix products on packed panels, in float or double. Included inside namespace entrgi::ENTRGI_ISA.
//
// One micro-kernel serves all three products of the method:
//   forward   soft[n, d]  += p[n, v] E[v, d]      A = tile of p,          B = E packed in panels of columns
//   backward  G^T[v, n]   += E[v, d] grad[n, d]^T A = rows of E as stored, B = grad^T packed once
//   table     dE[v, d]    += p[n, v]^T grad[n, d] A = tile of p, transposed by its strides, B = grad packed once
// so that a row of E is always read as it lies in memory.

#if ENTRGI_LEVEL >= 3
constexpr int MR = 12;
#else
constexpr int MR = 6;
#endif
constexpr int NV = 2;  // vectors per panel row
template <typename A>
constexpr int panel_width = NV * Lane<A>::W;

// Walks over rows of memory, one cache line a call. At few rows (n) the table's bytes are what takes the time: the products
// fetch what the next step reads while they compute.
struct Ahead {
  const char* base = nullptr;
  int64_t stride = 0, width = 0, rows = 0, row = 0, at = 0;

  void set(const void* p, int64_t stride_, int64_t width_, int64_t rows_) {
    base = (const char*)p;
    stride = stride_;
    width = width_;
    rows = rows_;
    row = at = 0;
  }
  int64_t lines() const { return rows * ceil_div(width, 64); }
  bool next() {
    if (row >= rows) return false;
    __builtin_prefetch(base + row * stride + at, 0, 2);
    at += 64;
    if (at >= width) {
      at = 0;
      row++;
    }
    return true;
  }
};
constexpr int AHEADS = 4;
struct Prefetcher {
  Ahead list[AHEADS];
  int current = 0, per_step = 0;

  void start(int64_t steps) {
    int64_t lines = 0;
    for (int i = 0; i < AHEADS; i++) lines += list[i].lines();
    per_step = (int)ceil_div(lines, steps < 1 ? 1 : steps);
    current = 0;
  }
  inline __attribute__((always_inline)) void step() {
    for (int i = 0; i < per_step && current < AHEADS; i++)
      while (current < AHEADS && !list[current].next()) current++;
  }
};

constexpr int64_t PREFETCH_EVERY = 8;  // values of k

// C[i, :] += sum_k a[i * lda + k * ldk] * b[k, :], for ROWS rows and one panel.
template <typename A, int ROWS>
static void micro(const A* a, int64_t lda, int64_t ldk, const A* b, int64_t depth, A* c, int64_t ldc,
                  Prefetcher* ahead) {
  typedef typename Lane<A>::V V;
  constexpr int W = Lane<A>::W;
  V acc[ROWS][NV];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++) acc[i][j] = load(c + i * ldc + j * W);
#pragma GCC unroll 1
  for (int64_t k = 0; k < depth; k++) {
    V right[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++) right[j] = load(b + j * W);
    b += NV * W;
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
      V left = set1(a[i * lda]);
#pragma GCC unroll 2
      for (int j = 0; j < NV; j++) acc[i][j] += left * right[j];
    }
    a += ldk;
    if (k % PREFETCH_EVERY == 0) ahead->step();
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++) store(acc[i][j], c + i * ldc + j * W);
}

template <typename A, int ROWS>
struct MicroChoice {
  static void run(int rows, const A* a, int64_t lda, int64_t ldk, const A* b, int64_t depth, A* c, int64_t ldc,
                  Prefetcher* ahead) {
    if (rows == ROWS) return micro<A, ROWS>(a, lda, ldk, b, depth, c, ldc, ahead);
    MicroChoice<A, ROWS - 1>::run(rows, a, lda, ldk, b, depth, c, ldc, ahead);
  }
};
template <typename A>
struct MicroChoice<A, 0> {
  static void run(int, const A*, int64_t, int64_t, const A*, int64_t, A*, int64_t, Prefetcher*) {}
};

// C[rows, panels] += A[rows, depth] B, B in panels [panel][panel_depth][width] of which `depth` rows are used.
// Rows are split into equal groups, so that 64 rows are 4 x 11 + 2 x 10 and not 5 x 12 + 4.
template <typename A>
static void product(
    int64_t rows, const A* a, int64_t lda, int64_t ldk, const A* b, int64_t panel_stride, int64_t panels,
    int64_t depth, A* c, int64_t ldc, Prefetcher* ahead) {
  const int64_t groups = ceil_div(rows, MR);
  ahead->start(panels * groups * ceil_div(depth, PREFETCH_EVERY));
  for (int64_t p = 0; p < panels; p++)
    for (int64_t g = 0; g < groups; g++) {
      const int64_t begin = g * rows / groups, end = (g + 1) * rows / groups;
      MicroChoice<A, MR>::run((int)(end - begin), a + begin * lda, lda, ldk, b + p * panel_stride, depth,
                              c + begin * ldc + p * panel_width<A>, ldc, ahead);
    }
}

// --- packing ----------------------------------------------------------------------------------------------------------
template <typename A, typename T>
INLINE typename Lane<A>::V load_as(const T* p) {
  constexpr int W = Lane<A>::W;
  if constexpr (__is_same(A, typename Store<T>::A)) {
    return load(p);
  } else {
    A buffer[W];
    for (int i = 0; i < W; i++) buffer[i] = (A)to_acc(p[i]);
    return load(buffer);
  }
}

template <typename A, typename T>
INLINE typename Lane<A>::V load_part_as(const T* p, int count) {
  A buffer[Lane<A>::W];
  for (int i = 0; i < Lane<A>::W; i++) buffer[i] = i < count ? (A)to_acc(p[i]) : (A)0;
  return load(buffer);
}
template <typename A, typename T>
INLINE void store_as(typename Lane<A>::V x, T* p) {
  if constexpr (__is_same(A, typename Store<T>::A)) {
    store(x, p);
  } else {
    A buffer[Lane<A>::W];
    store(x, buffer);
    for (int i = 0; i < Lane<A>::W; i++) from_acc(buffer[i], p + i);
  }
}
template <typename A, typename T>
INLINE void store_part_as(typename Lane<A>::V x, T* p, int count) {
  A buffer[Lane<A>::W];
  store(x, buffer);
  for (int i = 0; i < count; i++) from_acc(buffer[i], p + i);
}

// Rows [0, depth) of a row-major matrix, columns [0, columns), into panels [panel][panel_depth][width], zero padded.
template <typename A, typename T>
static void pack_rows(const T* x, int64_t stride, int64_t depth, int64_t columns, A* out, int64_t panel_depth) {
  constexpr int W = Lane<A>::W, NR = panel_width<A>;
  for (int64_t k = 0; k < depth; k++) {
    const T* row = x + k * stride;
    A* to = out + k * NR;
    int64_t c = 0;
    for (; c + NR <= columns; c += NR, to += panel_depth * NR)
#pragma GCC unroll 2
      for (int j = 0; j < NV; j++) store(load_as<A>(row + c + j * W), to + j * W);
    if (c < columns)
      for (int j = 0; j < NR; j++) to[j] = c + j < columns ? (A)to_acc(row[c + j]) : (A)0;
  }
}
template <typename A>
static void pack_rows_any(const Matrix& m, int64_t row, int64_t column, int64_t depth, int64_t columns, A* out,
                          int64_t panel_depth) {
  const int64_t at = row * m.stride + column;
  switch (m.dtype) {
    case Dtype::f64: return pack_rows(((const double*)m.data) + at, m.stride, depth, columns, out, panel_depth);
    case Dtype::f32: return pack_rows(((const float*)m.data) + at, m.stride, depth, columns, out, panel_depth);
    case Dtype::bf16: return pack_rows(((const bf16*)m.data) + at, m.stride, depth, columns, out, panel_depth);
    case Dtype::f16: return pack_rows(((const f16*)m.data) + at, m.stride, depth, columns, out, panel_depth);
  }
}

// Rows of a matrix as A, contiguous.
template <typename A, typename T>
static void convert_rows(const T* x, int64_t stride, int64_t rows, int64_t columns, A* out) {
  constexpr int W = Lane<A>::W;
  for (int64_t r = 0; r < rows; r++) {
    const T* row = x + r * stride;
    A* to = out + r * columns;
    int64_t c = 0;
    for (; c + W <= columns; c += W) store(load_as<A>(row + c), to + c);
    for (; c < columns; c++) to[c] = (A)to_acc(row[c]);
  }
}

template <typename A>
static void convert_rows_any(const Matrix& m, int64_t row, int64_t column, int64_t rows, int64_t columns, A* out) {
  const int64_t at = row * m.stride + column;
  switch (m.dtype) {
    case Dtype::f64: return convert_rows(((const double*)m.data) + at, m.stride, rows, columns, out);
    case Dtype::f32: return convert_rows(((const float*)m.data) + at, m.stride, rows, columns, out);
    case Dtype::bf16: return convert_rows(((const bf16*)m.data) + at, m.stride, rows, columns, out);
    case Dtype::f16: return convert_rows(((const f16*)m.data) + at, m.stride, rows, columns, out);
  }
}

// exp((x - shift) / temperature) normalised, for `count` entries of a row: by a factor or, BY_LOG, by a logarithm `norm`.
template <typename T, bool BY_LOG>
INLINE void probability_row(
    const T* x, int64_t count, typename Store<T>::A shift, typename Store<T>::A norm, Scale<typename Store<T>::A> scale,
    typename Store<T>::A* out, int64_t padded) {
  typedef typename Store<T>::A A;
  constexpr int W = Lane<A>::W;
  const auto s = set1(shift), l = set1(norm);
  const auto f = set1(!BY_LOG ? norm : norm == norm ? (A)1 : (A)NAN);  // vexp does not keep NaN
  int64_t i = 0;
  for (; i < count; i += W) {
    int rest = (int)(count - i < W ? count - i : W);
    auto v = rest == W ? load(x + i) : load_part(x + i, rest, (A)-INFINITY);
    const auto y = BY_LOG ? log_probability(v, s, l, scale) : scaled(v, s, scale);
    store(vexp(y) * f, out + i);
  }
  for (; i < padded; i += W) store(zero<A>(), out + i);
}

#include "few.h"

// --- forward ----------------------------------------------------------------------------------------------------------
// Rows of E per packed block: it must stay in L2 beside the tile of p.
template <typename A>
INLINE int64_t forward_block(const ForwardJob& job) {
  int64_t columns = ceil_div(round_up(job.d, panel_width<A>), job.groups);
  int64_t fit = (512 << 10) / (columns * (int64_t)sizeof(A));
  fit = fit / 16 * 16;
  return fit < 32 ? 32 : fit > 256 ? 256 : fit;
}
constexpr int64_t FORWARD_ROWS = 256;  // rows of p per tile

template <typename A>
static void forward_padding_plain(const ForwardJob& job, int64_t* rows, int64_t* columns) {
  *rows = job.n;
  *columns = round_up(job.d, panel_width<A>);
}
template <typename A>
static int64_t forward_scratch_plain(const ForwardJob& job) {
  int64_t columns = round_up(job.d, panel_width<A>), block = forward_block<A>(job);
  int64_t rows = job.n < FORWARD_ROWS ? job.n : FORWARD_ROWS;
  return (columns * block + rows * block) * (int64_t)sizeof(A) + 128;
}

// [begin, end) of the V range or the column range that part `i` of `parts` covers, in multiples of `unit`.
INLINE void part_of(int64_t total, int64_t unit, int64_t parts, int64_t i, int64_t* begin, int64_t* end) {
  int64_t units = ceil_div(total, unit);
  *begin = units * i / parts * unit;
  *end = units * (i + 1) / parts * unit;
  if (*begin > total) *begin = total;
  if (*end > total) *end = total;
}

// p of rows [n0, n0 + rows), columns [v, v + depth)
template <typename T>
static void probability_tile(const ForwardJob& job, int64_t n0, int64_t rows, int64_t v, int64_t depth,
                             Scale<typename Store<T>::A> scale, typename Store<T>::A* tile, int64_t stride) {
  typedef typename Store<T>::A A;
  for (int64_t r = 0; r < rows; r++) {
    const T* x = (const T*)job.logits.data + (n0 + r) * job.logits.stride + v;
    const A top = ((const A*)job.maximum)[n0 + r], total = ((const A*)job.total)[n0 + r];
    probability_row<T, false>(x, depth, top, (A)1 / total, scale, tile + r * stride, depth);
  }
}

INLINE void round_row(float* p, int64_t count) {  // to bf16, in whole vectors
  constexpr int W = Lane<float>::W;
  bf16 narrow[W];
  for (int64_t i = 0; i < count; i += W) {
    store(load(p + i), narrow);
    store(load(narrow), p + i);
  }
}

// ROUNDED: few rows, with p rounded to bf16 (bf16.h).
template <typename T, bool ROUNDED = false>
static void forward_unit_plain(const ForwardJob& job, int64_t unit, void* scratch) {
  typedef typename Store<T>::A A;
  constexpr int NR = panel_width<A>;
  const int64_t split = unit / job.groups, group = unit % job.groups;
  const int64_t block = forward_block<A>(job), padded = round_up(job.d, NR);
  int64_t v0, v1, d0, d1;
  part_of(job.v, 256, job.splits, split, &v0, &v1);
  part_of(job.d, NR, job.groups, group, &d0, &d1);
  const int64_t panels = ceil_div(d1 - d0, NR);
  A* packed = (A*)scratch;
  A* tile = packed + panels * NR * block;
  A* c = (A*)job.accumulators + split * job.n * padded + d0;
  for (int64_t n = 0; n < job.n; n++) __builtin_memset(c + n * padded, 0, sizeof(A) * panels * NR);
  const Scale<A> scale = reciprocal<A>(job.temperature);
  for (int64_t v = v0; v < v1; v += block) {
    const int64_t depth = v1 - v < block ? v1 - v : block;
    if (ROUNDED || job.n <= FEW) {
      probability_tile<T>(job, 0, job.n, v, depth, scale, tile, block);
      if constexpr (ROUNDED)
        for (int64_t r = 0; r < job.n; r++) round_row(tile + r * block, depth);
      few_forward_any<A>(job.n, tile, block, job.embedding, v, d0, depth, d1 - d0, c, padded);
      continue;
    }
    pack_rows_any<A>(job.embedding, v, d0, depth, d1 - d0, packed, block);
    for (int64_t n0 = 0; n0 < job.n; n0 += FORWARD_ROWS) {
      const int64_t rows = job.n - n0 < FORWARD_ROWS ? job.n - n0 : FORWARD_ROWS;
      probability_tile<T>(job, n0, rows, v, depth, scale, tile, block);
      Prefetcher ahead;
      const int64_t after = v + block, next = after >= v1 ? 0 : v1 - after < block ? v1 - after : block;
      const int64_t width = size_of(job.embedding.dtype), size = (int64_t)sizeof(T);
      if (next) {
        ahead.list[0].set((const T*)job.logits.data + n0 * job.logits.stride + after, job.logits.stride * size,
                          next * size, rows);
        if (n0 == 0)
          ahead.list[1].set((const char*)job.embedding.data + (after * job.embedding.stride + d0) * width,
                            job.embedding.stride * width, (d1 - d0) * width, next);
      }
      product<A>(rows, tile, block, 1, packed, block * NR, panels, depth, c + n0 * padded, padded, &ahead);
    }
  }
}

// Adds the splits in order; mixes in the hard token's embedding. `order(d)` maps a column to its place in the accumulator.
template <typename A, typename T, typename Order>
static void combine_rows(const ForwardJob& job, int64_t begin, int64_t end, int64_t rows, int64_t columns, Order order) {
  for (int64_t n = begin; n < end; n++) {
    A* soft = (A*)job.soft + n * job.d;
    const A bad = ((const A*)job.maximum)[n] == ((const A*)job.maximum)[n] ? (A)0 : (A)NAN;
    const A* c = (const A*)job.accumulators + n * columns;
    for (int64_t d = 0; d < job.d; d++) soft[d] = c[order(d)] + bad;
    for (int64_t s = 1; s < job.splits; s++) {
      c += rows * columns;
      for (int64_t d = 0; d < job.d; d++) soft[d] += c[order(d)];
    }
    if (!job.tokens) continue;
    const int64_t token = job.tokens[n] < 0 ? 0 : job.tokens[n];
    const T* hard = (const T*)job.embedding.data + token * job.embedding.stride;
    T* mixed = (T*)job.mixed.data + (job.places ? job.places[n] : n) * job.mixed.stride;
    const A w = ((const A*)job.weight)[n];
    for (int64_t d = 0; d < job.d; d++) {
      const A h = (A)to_acc(hard[d]), difference = h - soft[d];
      // torch.lerp's form: from the nearer end, so that w = 0 and w = 1 are exact
      from_acc(w < (A)0.5 ? soft[d] + w * difference : h - difference * ((A)1 - w), mixed + d);
    }
  }
}
struct PlainOrder {
  int64_t operator()(int64_t d) const { return d; }
};
template <typename A, typename Order>
static void combine_any(const ForwardJob& job, int64_t begin, int64_t end, int64_t rows, int64_t columns, Order order) {
  switch (job.embedding.dtype) {
    case Dtype::f64: return combine_rows<A, double>(job, begin, end, rows, columns, order);
    case Dtype::f32: return combine_rows<A, float>(job, begin, end, rows, columns, order);
    case Dtype::bf16: return combine_rows<A, bf16>(job, begin, end, rows, columns, order);
    case Dtype::f16: return combine_rows<A, f16>(job, begin, end, rows, columns, order);
  }
}
template <typename A>
static void forward_combine_plain(const ForwardJob& job, int64_t begin, int64_t end) {
  combine_any<A>(job, begin, end, job.n, round_up(job.d, panel_width<A>), PlainOrder());
}
