// Products with a few rows (n <= FEW). Each byte of the table is used so little that reading it is what takes the time: it
// goes by once, as it lies in memory, and is neither packed nor padded. Included inside namespace entrgi::ENTRGI_ISA.

constexpr int64_t FEW = 16;
constexpr int64_t CHUNK = 4;  // rows that share the registers; the next chunk finds the table's block in cache

// c[r, :] += sum over k of p[r, k] e[k, :]; K rows of the table at a time, so that c is read and written once for all of
// them. c has whole vectors, e has not.
template <typename A, typename T, int ROWS, int K>
INLINE void weighted_rows(const A* p, int64_t ldp, const T* e, int64_t stride, int64_t columns, A* c, int64_t ldc) {
  typedef typename Lane<A>::V V;
  constexpr int W = Lane<A>::W;
  V left[ROWS][K];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) left[r][k] = set1(p[r * ldp + k]);
#pragma GCC unroll 1
  for (int64_t d = 0; d < columns; d += W) {
    const int rest = (int)(columns - d < W ? columns - d : W);
    V sums[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) sums[r] = load(c + r * ldc + d);
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) {
      const T* at = e + k * stride + d;
      __builtin_prefetch(at + K * stride);
      const V right = rest == W ? load_as<A>(at) : load_part_as<A>(at, rest);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) sums[r] += left[r][k] * right;
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) store(sums[r], c + r * ldc + d);
  }
}
template <typename A, typename T, int ROWS>
static void few_forward(const A* p, int64_t ldp, const T* e, int64_t stride, int64_t depth, int64_t columns, A* c,
                        int64_t ldc) {
  constexpr int K = ROWS <= 2 ? 8 : 4;
  int64_t k = 0;
  for (; k + K <= depth; k += K)
    weighted_rows<A, T, ROWS, K>(p + k, ldp, e + k * stride, stride, columns, c, ldc);
  for (; k < depth; k++) weighted_rows<A, T, ROWS, 1>(p + k, ldp, e + k * stride, stride, columns, c, ldc);
}
template <typename A, typename T>
static void few_forward(int64_t rows, const A* p, int64_t ldp, const T* e, int64_t stride, int64_t depth,
                        int64_t columns, A* c, int64_t ldc) {
  for (; rows > 0; rows -= CHUNK, p += CHUNK * ldp, c += CHUNK * ldc) switch (rows) {
      case 1: few_forward<A, T, 1>(p, ldp, e, stride, depth, columns, c, ldc); break;
      case 2: few_forward<A, T, 2>(p, ldp, e, stride, depth, columns, c, ldc); break;
      case 3: few_forward<A, T, 3>(p, ldp, e, stride, depth, columns, c, ldc); break;
      default: few_forward<A, T, 4>(p, ldp, e, stride, depth, columns, c, ldc);
    }
}
template <typename A>
static void few_forward_any(int64_t rows, const A* p, int64_t ldp, const Matrix& e, int64_t row, int64_t column,
                            int64_t depth, int64_t columns, A* c, int64_t ldc) {
  const int64_t at = row * e.stride + column;
  switch (e.dtype) {
    case Dtype::f64: return few_forward(rows, p, ldp, (const double*)e.data + at, e.stride, depth, columns, c, ldc);
    case Dtype::f32: return few_forward(rows, p, ldp, (const float*)e.data + at, e.stride, depth, columns, c, ldc);
    case Dtype::bf16: return few_forward(rows, p, ldp, (const bf16*)e.data + at, e.stride, depth, columns, c, ldc);
    case Dtype::f16: return few_forward(rows, p, ldp, (const f16*)e.data + at, e.stride, depth, columns, c, ldc);
  }
}

// Lanes added pairwise.
template <typename A>
INLINE A lane_sum(typename Lane<A>::V x) {
  A buffer[Lane<A>::W];
  store(x, buffer);
#pragma GCC unroll 4
  for (int half = Lane<A>::W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) buffer[i] += buffer[i + half];
  return buffer[0];
}

// g[r, k] = e[k, :] . grad[r, :] for K rows of the table; grad has whole vectors, zero padded.
template <typename A, typename T, int ROWS, int K>
INLINE void dot_rows(const T* e, int64_t stride, int64_t columns, const A* grad, int64_t ldr, A* g, int64_t ldg) {
  typedef typename Lane<A>::V V;
  constexpr int W = Lane<A>::W;
  V sums[K][ROWS];
#pragma GCC unroll 8
  for (int k = 0; k < K; k++)
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) sums[k][r] = zero<A>();
#pragma GCC unroll 1
  for (int64_t d = 0; d < columns; d += W) {
    const int rest = (int)(columns - d < W ? columns - d : W);
    V right[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) right[r] = load(grad + r * ldr + d);
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) {
      const T* at = e + k * stride + d;
      __builtin_prefetch(at + K * stride);
      const V left = rest == W ? load_as<A>(at) : load_part_as<A>(at, rest);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) sums[k][r] += left * right[r];
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < K; k++)
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) g[r * ldg + k] = lane_sum<A>(sums[k][r]);
}
template <typename A, typename T, int ROWS>
static void few_backward(const T* e, int64_t stride, int64_t count, int64_t columns, const A* grad, int64_t ldr, A* g,
                         int64_t ldg) {
  constexpr int K = ROWS == 1 ? 8 : 4;
  int64_t k = 0;
  for (; k + K <= count; k += K)
    dot_rows<A, T, ROWS, K>(e + k * stride, stride, columns, grad, ldr, g + k, ldg);
  for (; k < count; k++) dot_rows<A, T, ROWS, 1>(e + k * stride, stride, columns, grad, ldr, g + k, ldg);
}
template <typename A, typename T>
static void few_backward(int64_t rows, const T* e, int64_t stride, int64_t count, int64_t columns, const A* grad,
                         int64_t ldr, A* g, int64_t ldg) {
  for (; rows > 0; rows -= CHUNK, grad += CHUNK * ldr, g += CHUNK * ldg) switch (rows) {
      case 1: few_backward<A, T, 1>(e, stride, count, columns, grad, ldr, g, ldg); break;
      case 2: few_backward<A, T, 2>(e, stride, count, columns, grad, ldr, g, ldg); break;
      case 3: few_backward<A, T, 3>(e, stride, count, columns, grad, ldr, g, ldg); break;
      default: few_backward<A, T, 4>(e, stride, count, columns, grad, ldr, g, ldg);
    }
}
template <typename A>
static void few_backward_any(int64_t rows, const Matrix& e, int64_t row, int64_t count, int64_t columns, const A* grad,
                             int64_t ldr, A* g, int64_t ldg) {
  const int64_t at = row * e.stride;
  switch (e.dtype) {
    case Dtype::f64: return few_backward(rows, (const double*)e.data + at, e.stride, count, columns, grad, ldr, g, ldg);
    case Dtype::f32: return few_backward(rows, (const float*)e.data + at, e.stride, count, columns, grad, ldr, g, ldg);
    case Dtype::bf16: return few_backward(rows, (const bf16*)e.data + at, e.stride, count, columns, grad, ldr, g, ldg);
    case Dtype::f16: return few_backward(rows, (const f16*)e.data + at, e.stride, count, columns, grad, ldr, g, ldg);
  }
}
