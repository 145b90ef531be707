// One vector of the instruction set that this file is compiled for, as GCC vector extensions, so that the kernels above
// it are written once. Included inside namespace entrgi::ENTRGI_ISA, after the target pragma; never includes anything.

#if ENTRGI_LEVEL >= 3
#define ENTRGI_VB 64
#elif ENTRGI_LEVEL >= 2
#define ENTRGI_VB 32
#else
#define ENTRGI_VB 16
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(ENTRGI_VB)));
typedef double vd __attribute__((vector_size(ENTRGI_VB)));
typedef int32_t vi __attribute__((vector_size(ENTRGI_VB)));
typedef uint32_t vu __attribute__((vector_size(ENTRGI_VB)));
typedef int64_t vl __attribute__((vector_size(ENTRGI_VB)));
typedef uint64_t vul __attribute__((vector_size(ENTRGI_VB)));
typedef uint16_t vh __attribute__((vector_size(ENTRGI_VB / 2)));
typedef float vf_u __attribute__((vector_size(ENTRGI_VB), aligned(4), may_alias));
typedef double vd_u __attribute__((vector_size(ENTRGI_VB), aligned(8), may_alias));
typedef uint16_t vh_u __attribute__((vector_size(ENTRGI_VB / 2), aligned(2), may_alias));

constexpr int WF = ENTRGI_VB / 4, WD = ENTRGI_VB / 8;

// acc type -> vector, lanes, integer lanes
template <typename A>
struct Lane;
template <>
struct Lane<float> {
  typedef vf V;
  typedef vi I;
  typedef vf_u U;
  static constexpr int W = WF;
};
template <>
struct Lane<double> {
  typedef vd V;
  typedef vl I;
  typedef vd_u U;
  static constexpr int W = WD;
};

// storage type -> acc type, ordered bit pattern
template <typename T>
struct Store;
template <>
struct Store<double> {
  typedef double A;
  typedef uint64_t Key;
};
template <>
struct Store<float> {
  typedef float A;
  typedef uint32_t Key;
};
template <>
struct Store<bf16> {
  typedef float A;
  typedef uint16_t Key;
};
template <>
struct Store<f16> {
  typedef float A;
  typedef uint16_t Key;
};

INLINE vf set1(float x) {
#if ENTRGI_LEVEL >= 3
  return (vf)_mm512_set1_ps(x);
#elif ENTRGI_LEVEL >= 2
  return (vf)_mm256_set1_ps(x);
#else
  vf r;
  for (int i = 0; i < WF; i++) r[i] = x;
  return r;
#endif
}
INLINE vd set1(double x) {
#if ENTRGI_LEVEL >= 3
  return (vd)_mm512_set1_pd(x);
#elif ENTRGI_LEVEL >= 2
  return (vd)_mm256_set1_pd(x);
#else
  vd r;
  for (int i = 0; i < WD; i++) r[i] = x;
  return r;
#endif
}
template <typename A>
INLINE typename Lane<A>::V zero() {
  typename Lane<A>::V z = {};
  return z;
}

INLINE float bits_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
INLINE uint32_t float_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

// --- scalar conversions -----------------------------------------------------------------------------------------------
INLINE double to_acc(double x) { return x; }
INLINE float to_acc(float x) { return x; }
INLINE float to_acc(bf16 x) { return bits_float((uint32_t)x.bits << 16); }
INLINE float to_acc(f16 x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  float f;  // no step of it may be a denormal float: the drivers flush these
  if (rest < 0x400)
    f = (float)rest * 0x1p-24f;
  else
    f = bits_float((rest << 13) + (rest < 0x7c00 ? 0x38000000u : 0x70000000u));
  return bits_float(float_bits(f) | sign);
}
INLINE void from_acc(double x, double* p) { *p = x; }
INLINE void from_acc(double x, float* p) { *p = (float)x; }
INLINE void from_acc(float x, float* p) { *p = x; }
INLINE void from_acc(float x, double* p) { *p = x; }
INLINE void from_acc(float x, bf16* p) {
  uint32_t u = float_bits(x);
  if (x != x) {
    p->bits = 0x7fc0;
    return;
  }
  p->bits = (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
INLINE void from_acc(double x, bf16* p) { from_acc((float)x, p); }
INLINE void from_acc(float x, f16* p) {
  uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff, h;
  if (a > 0x7f800000) {
    h = 0x7e00;
  } else if (a >= 0x477ff000) {
    h = 0x7c00;  // rounds to infinity
  } else if (a < 0x38800000) {
    h = float_bits(bits_float(a) + 0.5f) - 0x3f000000u;  // denormal: the addition rounds to even at 2^-24
  } else {
    h = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1)) >> 13;
  }
  p->bits = (uint16_t)(h | sign);
}
INLINE void from_acc(double x, f16* p) { from_acc((float)x, p); }

// --- vector loads and stores ------------------------------------------------------------------------------------------
INLINE vf load(const float* p) { return *(const vf_u*)p; }
INLINE vd load(const double* p) { return *(const vd_u*)p; }
INLINE vf load(const bf16* p) {
#if ENTRGI_LEVEL >= 3
  __m512i u = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return (vf)_mm512_slli_epi32(u, 16);
#elif ENTRGI_LEVEL >= 2
  __m256i u = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return (vf)_mm256_slli_epi32(u, 16);
#else
  vu u = __builtin_convertvector(*(const vh_u*)p, vu);
  return (vf)(u << 16);
#endif
}
INLINE vf load(const f16* p) {
#if ENTRGI_LEVEL >= 3
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif ENTRGI_LEVEL >= 2
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vf r;
  for (int i = 0; i < WF; i++) r[i] = to_acc(p[i]);
  return r;
#endif
}
INLINE void store(vf x, float* p) { *(vf_u*)p = x; }
INLINE void store(vd x, double* p) { *(vd_u*)p = x; }
INLINE void store(vf x, bf16* p) {
  vu u = (vu)x;
  vu r = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
  r = (x == x) ? r : (vu)(vi)(set1(0.0f) == set1(0.0f)) & 0x7fc0u;
#if ENTRGI_LEVEL >= 3
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)r));
#else
  *(vh_u*)p = __builtin_convertvector(r, vh);
#endif
}
INLINE void store(vf x, f16* p) {
#if ENTRGI_LEVEL >= 3
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif ENTRGI_LEVEL >= 2
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < WF; i++) from_acc((float)x[i], p + i);
#endif
}
// The first `count` lanes; the others read `fill` / are not written.
template <typename T>
INLINE typename Lane<typename Store<T>::A>::V load_part(const T* p, int count, typename Store<T>::A fill) {
  typedef typename Store<T>::A A;
  A buffer[Lane<A>::W];
  for (int i = 0; i < Lane<A>::W; i++) buffer[i] = i < count ? to_acc(p[i]) : fill;
  return load(buffer);
}
template <typename T>
INLINE void store_part(typename Lane<typename Store<T>::A>::V x, T* p, int count) {
  typedef typename Store<T>::A A;
  A buffer[Lane<A>::W];
  store(x, buffer);
  for (int i = 0; i < count; i++) from_acc(buffer[i], p + i);
}

// --- small helpers ----------------------------------------------------------------------------------------------------
// One bit per lane where a >= b.
INLINE uint32_t mask_ge(vf a, vf b) {
#if ENTRGI_LEVEL >= 3
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
#elif ENTRGI_LEVEL >= 2
  return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ));
#else
  uint32_t m = 0;
  for (int i = 0; i < WF; i++) m |= (uint32_t)(a[i] >= b[i]) << i;
  return m;
#endif
}
INLINE uint32_t mask_ge(vd a, vd b) {
#if ENTRGI_LEVEL >= 3
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GE_OQ);
#elif ENTRGI_LEVEL >= 2
  return (uint32_t)_mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_GE_OQ));
#else
  uint32_t m = 0;
  for (int i = 0; i < WD; i++) m |= (uint32_t)(a[i] >= b[i]) << i;
  return m;
#endif
}
// max(a, b), b where a is NaN
template <typename V>
INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}
INLINE vf vsqrt(vf x) {
#if ENTRGI_LEVEL >= 3
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif ENTRGI_LEVEL >= 2
  return (vf)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < WF; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
INLINE vd vsqrt(vd x) {
#if ENTRGI_LEVEL >= 3
  return (vd)_mm512_sqrt_pd((__m512d)x);
#elif ENTRGI_LEVEL >= 2
  return (vd)_mm256_sqrt_pd((__m256d)x);
#else
  for (int i = 0; i < WD; i++) x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}
// Lanes added in order, in double.
template <typename A>
INLINE double sum(typename Lane<A>::V x) {
  A buffer[Lane<A>::W];
  store(x, buffer);
  double s = 0;
  for (int i = 0; i < Lane<A>::W; i++) s += (double)buffer[i];
  return s;
}
template <typename A>
INLINE A maximum(typename Lane<A>::V x) {
  A buffer[Lane<A>::W];
  store(x, buffer);
  A m = buffer[0];
  for (int i = 1; i < Lane<A>::W; i++) m = buffer[i] > m ? buffer[i] : m;
  return m;
}

// --- exp --------------------------------------------------------------------------------------------------------------
// exp(x) for x <= 80 (a softmax never asks for more); 0 below the smallest normal number; NaN is not kept.
INLINE vf vexp(vf x) {
  const vf low = set1(-87.0f);
  vf y = x > low ? x : low;
  vf t = y * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the addition rounds to an integer
  vf n = t - 12582912.0f;
  vf r = y - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  vf e = (vf)((vi)p + ((vi)t << 23));
  return x > low ? e : zero<float>();
}
INLINE vd vexp(vd x) {
  const vd low = set1(-708.0);
  vd y = x > low ? x : low;
  vd t = y * 1.44269504088896338700 + 6755399441055744.0;
  vd n = t - 6755399441055744.0;
  vd r = y - n * 6.93147180369123816490e-01;
  r = r - n * 1.90821492927058770002e-10;
  // Taylor: |r| <= ln2 / 2, the first term left out is below 5e-18
  vd p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * (r * r) + r + 1.0;
  vd e = (vd)((vl)p + ((vl)t << 52));
  return x > low ? e : zero<double>();
}

// Division by the temperature, as a multiplication whose reciprocal has twice the digits.
template <typename A>
struct Scale {
  A high, low;
};
template <typename A>
INLINE Scale<A> reciprocal(double temperature) {
  Scale<A> s;
  double inverse = 1.0 / temperature;
  s.high = (A)inverse;
  s.low = (A)(inverse - (double)s.high);
  return s;
}
// (x - shift) * scale for finite shift; -inf gives a large negative number, never NaN. Bounded after the scale: no
// temperature brings the bound near the other entries, or to an infinity whose product with 0 would be NaN.
INLINE vf scaled(vf x, vf shift, Scale<float> s) {
  vf d = x - shift;
  return vmax(d * s.high + d * s.low, set1(-1e30f));
}
INLINE vd scaled(vd x, vd shift, Scale<double> s) {
  vd d = x - shift;
  return vmax(d * s.high + d * s.low, set1(-1e300));
}
// (x - shift) * scale - rest, for vexp: -inf gives -inf or NaN, both of exponential 0 there
template <typename V, typename A>
INLINE V log_probability(V x, V shift, V rest, Scale<A> s) {
  V d = x - shift;
  return (d * s.high - rest) + d * s.low;
}
