// The gradient of the logits with its epilogue (store, Adam in place, or the first-order update), and that of the table.
// Included inside namespace entrgi::ENTRGI_ISA.

constexpr int64_t BACKWARD_DEPTH = 256;   // columns of E per step: a panel of grad^T then fits L1
constexpr int64_t BACKWARD_ROWS = 128;    // rows (n) of G^T at a time

// Rows of E per unit.
INLINE int64_t backward_block(const BackwardJob& job) { return job.n <= 16 ? 64 : 256; }

// Elements of a row of the gradient where it is not in panels: whole vectors.
template <typename A>
INLINE int64_t few_width(const BackwardJob& job) {
  return round_up(job.d, Lane<A>::W);
}
template <typename A>
static int64_t gradient_pack_size_plain(const BackwardJob& job) {
  const int64_t size = job.n <= FEW ? job.n * few_width<A>(job) : round_up(job.n, panel_width<A>) * job.d;
  return size * (int64_t)sizeof(A) + 128;
}

// grad^T in panels [panel of n][d][width]
template <typename A, typename T>
static void pack_transposed(const T* x, int64_t stride, int64_t n, int64_t d, A* out) {
  constexpr int NR = panel_width<A>;
  for (int64_t p = 0; p < n; p += NR, out += d * NR)
    for (int j = 0; j < NR; j++)
      for (int64_t k = 0; k < d; k++) out[k * NR + j] = p + j < n ? (A)to_acc(x[(p + j) * stride + k]) : (A)0;
}
template <typename A>
static void pack_gradient_plain(const BackwardJob& job) {
  const void* x = job.grad.data;
  const int64_t s = job.grad.stride;
  A* out = (A*)job.packed;
  if (job.n <= FEW) {
    const int64_t width = few_width<A>(job);
    __builtin_memset(out, 0, sizeof(A) * (size_t)(job.n * width));
    for (int64_t n = 0; n < job.n; n++) convert_rows_any(job.grad, n, 0, 1, job.d, out + n * width);
    return;
  }
  switch (job.grad.dtype) {
    case Dtype::f64: return pack_transposed((const double*)x, s, job.n, job.d, out);
    case Dtype::f32: return pack_transposed((const float*)x, s, job.n, job.d, out);
    case Dtype::bf16: return pack_transposed((const bf16*)x, s, job.n, job.d, out);
    case Dtype::f16: return pack_transposed((const f16*)x, s, job.n, job.d, out);
  }
}

static int64_t backward_units_any(const BackwardJob& job) { return ceil_div(job.v, backward_block(job)); }

// G^T [rows][ldg] -> G [columns][ld]
#if ENTRGI_LEVEL >= 3
INLINE void transpose16(const float* in, int64_t ldi, float* out, int64_t ldo) {
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(in + i * ldi);
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    __m512 a = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88), b = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    __m512 c = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd), d = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
    _mm512_storeu_ps(out + i * ldo, _mm512_shuffle_f32x4(a, b, 0x88));
    _mm512_storeu_ps(out + (i + 8) * ldo, _mm512_shuffle_f32x4(a, b, 0xdd));
    _mm512_storeu_ps(out + (i + 4) * ldo, _mm512_shuffle_f32x4(c, d, 0x88));
    _mm512_storeu_ps(out + (i + 12) * ldo, _mm512_shuffle_f32x4(c, d, 0xdd));
  }
}
#endif
template <typename A>
static void transpose(const A* in, int64_t ldi, int64_t rows, int64_t columns, A* out, int64_t ldo) {
  constexpr int B = 16;
  for (int64_t r = 0; r < rows; r += B)
    for (int64_t c = 0; c < columns; c += B) {
      const int64_t r1 = rows - r < B ? rows - r : B, c1 = columns - c < B ? columns - c : B;
#if ENTRGI_LEVEL >= 3
      if constexpr (sizeof(A) == 4) {
        if (r1 == B && c1 == B) {
          transpose16(in + r * ldi + c, ldi, out + c * ldo + r, ldo);
          continue;
        }
      }
#endif
      for (int64_t j = 0; j < c1; j++)
        for (int64_t i = 0; i < r1; i++) out[(c + j) * ldo + r + i] = in[(r + i) * ldi + c + j];
    }
}

// Constants of a row's epilogue.
template <typename A>
struct RowEpilogue {
  Scale<A> scale;
  A shift, rest, baseline, factor;  // factor: 1 / temperature, NaN for a bad row
};

// first / (sqrt(second) * scale + eps). In float with AVX-512 by the processor's estimates and a Newton step each, right to
// two units in the last place: its square root and division would take a third of the epilogue's time.
template <typename V, typename A>
INLINE V adam_quotient(V first, V second, A scale, A eps) {
#if ENTRGI_LEVEL >= 3
  if constexpr (__is_same(A, float)) {
    const V estimate = (V)_mm512_rsqrt14_ps((__m512)vmax(second, set1(1.17549435e-38f)));  // 0 has a root, too
    const V root = second * estimate * (1.5f - 0.5f * second * estimate * estimate);
    const V divisor = root * scale + eps, inverse = (V)_mm512_rcp14_ps((__m512)divisor);
    return first * (inverse * (2.0f - divisor * inverse));
  }
#endif
  return first / (vsqrt(second) * scale + eps);
}

template <typename A>
struct AdamConstants {
  A beta1, beta2, rest1, rest2, step_size, scale, eps;
  explicit AdamConstants(const Adam& c)
      : beta1((A)c.beta1), beta2((A)c.beta2), rest1((A)(1 - c.beta1)), rest2((A)(1 - c.beta2)),
        step_size((A)c.step_size), scale((A)(1.0 / c.sqrt_correction2)), eps((A)c.eps) {}
};

// One row of a tile: `g` holds grad . E_v for `count` columns from column v0 of row n.
template <typename T, typename M>
static void epilogue_row(
    const BackwardJob& job, int64_t n, int64_t v0, int64_t count, const typename Store<T>::A* g,
    const RowEpilogue<typename Store<T>::A>& e) {
  typedef typename Store<T>::A A;
  typedef typename Lane<A>::V V;
  constexpr int W = Lane<A>::W;
  T* x = (T*)job.logits.data + n * job.logits.stride + v0;
  const V shift = set1(e.shift), norm = set1(e.rest), baseline = set1(e.baseline), factor = set1(e.factor);
  if (job.out.data) {
    T* out = (T*)job.out.data + n * job.out.stride + v0;
    for (int64_t i = 0; i < count; i += W) {
      const int rest = (int)(count - i < W ? count - i : W);
      V value = rest == W ? load(x + i) : load_part(x + i, rest, (A)-INFINITY);
      V gradient = vexp(log_probability(value, shift, norm, e.scale)) * (load(g + i) - baseline) * factor;
      if (rest == W)
        store(gradient, out + i);
      else
        store_part(gradient, out + i, rest);
    }
    return;
  }
  const AdamConstants<A> c(job.adam);
  const bool reads = job.adam.reads, writes = job.adam.writes, state = reads || writes;
  M* m = state ? (M*)job.exp_avg.data + n * job.exp_avg.stride + v0 : nullptr;
  M* s = state ? (M*)job.exp_avg_sq.data + n * job.exp_avg_sq.stride + v0 : nullptr;
  for (int64_t i = 0; i < count; i += W) {
    const int rest = (int)(count - i < W ? count - i : W);
    const bool full = rest == W;
    V value = full ? load(x + i) : load_part(x + i, rest, (A)-INFINITY);
    V gradient = vexp(log_probability(value, shift, norm, e.scale)) * (load(g + i) - baseline) * factor;
    V first = gradient * c.rest1, second = gradient * gradient * c.rest2;
    if (reads) {
      first += (full ? load_as<A>(m + i) : load_part_as<A>(m + i, rest)) * c.beta1;
      second += (full ? load_as<A>(s + i) : load_part_as<A>(s + i, rest)) * c.beta2;
    }
    value -= c.step_size * adam_quotient(first, second, c.scale, c.eps);
    if (full) {
      store(value, x + i);
      if (writes) {
        store_as<A>(first, m + i);
        store_as<A>(second, s + i);
      }
    } else {
      store_part(value, x + i, rest);
      if (writes) {
        store_part_as<A>(first, m + i, rest);
        store_part_as<A>(second, s + i, rest);
      }
    }
  }
}

// The same of a linear job: logits += scale (grad . E_v - baseline), in place.
template <typename T>
static void linear_row(const BackwardJob& job, int64_t n, int64_t v0, int64_t count, const typename Store<T>::A* g) {
  typedef typename Store<T>::A A;
  typedef typename Lane<A>::V V;
  constexpr int W = Lane<A>::W;
  T* x = (T*)job.logits.data + n * job.logits.stride + v0;
  const V baseline = set1(((const A*)job.baseline)[n]), scale = set1((A)job.scale);
  for (int64_t i = 0; i < count; i += W) {
    const int rest = (int)(count - i < W ? count - i : W);
    V value = rest == W ? load(x + i) : load_part(x + i, rest, (A)0);
    value += scale * (load(g + i) - baseline);
    if (rest == W)
      store(value, x + i);
    else
      store_part(value, x + i, rest);
  }
}

// Rows [n0, n0 + rows) of a tile of `count` columns, g [rows][ldg].
template <typename T>
static void epilogue(const BackwardJob& job, int64_t n0, int64_t rows, int64_t v0, int64_t count,
                     const typename Store<T>::A* g, int64_t ldg) {
  typedef typename Store<T>::A A;
  for (int64_t r = 0; r < rows; r++) {
    const int64_t n = n0 + r;
    if (job.linear) {
      linear_row<T>(job, n, v0, count, g + r * ldg);
      continue;
    }
    RowEpilogue<A> e;
    e.scale = reciprocal<A>(job.temperature);
    e.shift = ((const A*)job.norm.shift)[n];
    e.rest = ((const A*)job.norm.rest)[n];
    e.baseline = ((const A*)job.baseline)[n];
    e.factor = e.rest == e.rest ? e.scale.high : (A)NAN;
    const bool wide_state = job.exp_avg.data && job.exp_avg.dtype != job.logits.dtype;
    if (wide_state)  // the driver allows float moments under 16-bit logits, nothing else
      epilogue_row<T, float>(job, n, v0, count, g + r * ldg, e);
    else
      epilogue_row<T, T>(job, n, v0, count, g + r * ldg, e);
  }
}

// Fetch what the epilogue of a tile reads.
template <typename T>
static void ahead_of_epilogue(const BackwardJob& job, int64_t n0, int64_t rows, int64_t v0, int64_t count,
                              Prefetcher* ahead) {
  const int64_t size = (int64_t)sizeof(T);
  ahead->list[1].set((const T*)job.logits.data + n0 * job.logits.stride + v0, job.logits.stride * size, count * size,
                     rows);
  if (!job.adam.reads) return;
  const Matrix *m = &job.exp_avg, *s = &job.exp_avg_sq;
  const int64_t wide = size_of(m->dtype);
  ahead->list[2].set((const char*)m->data + (n0 * m->stride + v0) * wide, m->stride * wide, count * wide, rows);
  ahead->list[3].set((const char*)s->data + (n0 * s->stride + v0) * wide, s->stride * wide, count * wide, rows);
}

template <typename A>
static int64_t backward_scratch_plain(const BackwardJob& job) {
  const int64_t block = backward_block(job), rows = job.n < BACKWARD_ROWS ? job.n : BACKWARD_ROWS;
  const int64_t padded = round_up(rows, panel_width<A>);
  int64_t size = block * padded + padded * round_up(block, 16) + 64;
  if (job.embedding.dtype != (sizeof(A) == 8 ? Dtype::f64 : Dtype::f32)) size += block * BACKWARD_DEPTH;
  return size * (int64_t)sizeof(A) + 128;
}

template <typename T>
static void backward_unit_plain(const BackwardJob& job, int64_t unit, void* scratch) {
  typedef typename Store<T>::A A;
  constexpr int NR = panel_width<A>;
  const int64_t block = backward_block(job), v0 = unit * block, count = job.v - v0 < block ? job.v - v0 : block;
  const int64_t most = job.n < BACKWARD_ROWS ? job.n : BACKWARD_ROWS, ldg = round_up(most, NR), ldt = round_up(block, 16);
  A* gt = (A*)scratch;         // [block][ldg]
  A* g = gt + block * ldg;     // [ldg][ldt]
  A* wide = g + ldg * ldt + 64;  // [block][BACKWARD_DEPTH], where E is not stored as A
  if (job.n <= FEW) {
    few_backward_any<A>(job.n, job.embedding, v0, count, job.d, (const A*)job.packed, few_width<A>(job), g, ldt);
    epilogue<T>(job, 0, job.n, v0, count, g, ldt);
    return;
  }
  constexpr Dtype own = sizeof(A) == 8 ? Dtype::f64 : Dtype::f32;
  for (int64_t n0 = 0; n0 < job.n; n0 += BACKWARD_ROWS) {
    const int64_t rows = job.n - n0 < BACKWARD_ROWS ? job.n - n0 : BACKWARD_ROWS, panels = ceil_div(rows, NR);
    for (int64_t i = 0; i < count; i++) __builtin_memset(gt + i * ldg, 0, sizeof(A) * panels * NR);
    for (int64_t d = 0; d < job.d; d += BACKWARD_DEPTH) {
      const int64_t depth = job.d - d < BACKWARD_DEPTH ? job.d - d : BACKWARD_DEPTH;
      const int64_t at = v0 * job.embedding.stride + d;
      const A* a = wide;
      int64_t lda = depth;
      if (job.embedding.dtype == own) {
        a = (const A*)job.embedding.data + at;
        lda = job.embedding.stride;
      } else {
        convert_rows_any(job.embedding, v0, d, count, depth, wide);
      }
      const A* b = (const A*)job.packed + n0 / NR * NR * job.d + d * NR;
      Prefetcher ahead;
      const int64_t next = d + depth, left = job.d - next, width = size_of(job.embedding.dtype);
      if (n0 == 0 && left > 0)
        ahead.list[0].set((const char*)job.embedding.data + (v0 * job.embedding.stride + next) * width,
                          job.embedding.stride * width, (left < depth ? left : depth) * width, count);
      if (left <= 0) ahead_of_epilogue<T>(job, n0, rows, v0, count, &ahead);
      product<A>(count, a, lda, 1, b, job.d * NR, panels, depth, gt, ldg, &ahead);
    }
    transpose(gt, ldg, count, rows, g, ldt);
    epilogue<T>(job, n0, rows, v0, count, g, ldt);
  }
}

// --- gradient of the table --------------------------------------------------------------------------------------------
constexpr int64_t TABLE_BLOCK = 48;   // rows of the table per unit
constexpr int64_t TABLE_DEPTH = 256;  // rows (n) per step

template <typename A>
static int64_t table_pack_size_plain(const TableJob& job) {
  return round_up(job.d, panel_width<A>) * job.n * (int64_t)sizeof(A) + 128;
}
template <typename A>
static void pack_table_plain(const TableJob& job) {
  pack_rows_any<A>(job.grad, 0, 0, job.n, job.d, (A*)job.packed, job.n);
}
INLINE int64_t table_units_any(const TableJob& job) { return ceil_div(job.v, TABLE_BLOCK); }
template <typename A>
static int64_t table_scratch_plain(const TableJob& job) {
  return (TABLE_BLOCK * round_up(job.d, panel_width<A>) + TABLE_BLOCK * TABLE_DEPTH) * (int64_t)sizeof(A) + 128;
}
template <typename A, typename O>
static void narrow_rows(const A* in, int64_t ldi, int64_t rows, int64_t columns, O* out, int64_t ldo) {
  constexpr int W = Lane<A>::W;
  for (int64_t r = 0; r < rows; r++) {
    int64_t c = 0;
    if constexpr (__is_same(A, typename Store<O>::A))
      for (; c + W <= columns; c += W) store(load(in + r * ldi + c), out + r * ldo + c);
    for (; c < columns; c++) from_acc(in[r * ldi + c], out + r * ldo + c);
  }
}

template <typename T>
static void table_unit_plain(const TableJob& job, int64_t unit, void* scratch) {
  typedef typename Store<T>::A A;
  constexpr int NR = panel_width<A>;
  const int64_t v0 = unit * TABLE_BLOCK, count = job.v - v0 < TABLE_BLOCK ? job.v - v0 : TABLE_BLOCK;
  const int64_t panels = ceil_div(job.d, NR), padded = panels * NR;
  A* c = (A*)scratch;
  A* tile = c + TABLE_BLOCK * padded;  // [n][TABLE_BLOCK]
  __builtin_memset(c, 0, sizeof(A) * count * padded);
  const Scale<A> scale = reciprocal<A>(job.temperature);
  for (int64_t n0 = 0; n0 < job.n; n0 += TABLE_DEPTH) {
    const int64_t depth = job.n - n0 < TABLE_DEPTH ? job.n - n0 : TABLE_DEPTH;
    for (int64_t r = 0; r < depth; r++) {
      const T* x = (const T*)job.logits.data + (n0 + r) * job.logits.stride + v0;
      const A shift = ((const A*)job.norm.shift)[n0 + r], rest = ((const A*)job.norm.rest)[n0 + r];
      probability_row<T, true>(x, count, shift, rest, scale, tile + r * TABLE_BLOCK, TABLE_BLOCK);
    }
    Prefetcher ahead;
    product<A>(count, tile, 1, TABLE_BLOCK, (const A*)job.packed + n0 * NR, job.n * NR, panels, depth, c, padded,
               &ahead);
  }
  const int64_t at = v0 * job.out.stride;
  switch (job.out.dtype) {
    case Dtype::f64: return narrow_rows(c, padded, count, job.d, (double*)job.out.data + at, job.out.stride);
    case Dtype::f32: return narrow_rows(c, padded, count, job.d, (float*)job.out.data + at, job.out.stride);
    case Dtype::bf16: return narrow_rows(c, padded, count, job.d, (bf16*)job.out.data + at, job.out.stride);
    case Dtype::f16: return narrow_rows(c, padded, count, job.d, (f16*)job.out.data + at, job.out.stride);
  }
}
