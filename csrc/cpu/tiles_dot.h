// Tiles of bf16.h by AVX-512's dot products of bf16 pairs (vdpbf16ps), for processors without AMX.

// A second or third term would cost as much as products in float, or more. Up to twelve rows few.h takes less time (on a Zen 5
// core the two products take 27 and 28 ms at 16 rows, V = 151,936 and D = 1024, few.h 30 and 36; at 12 rows 27 and 27, few.h
// 23 and 26).
constexpr int64_t TILED_TERMS = 1, TILED_ROWS = 13;

INLINE void tiles_begin() {}
INLINE void tiles_end() {}

// Rows [FIRST, FIRST + ROWS) of C, 16 S columns; arguments as of `tiles`.
template <int FIRST, int ROWS, int S>
static void dot(const char* a, int64_t a_tile, int64_t a_step, int64_t a_row, const char* b, int64_t b_tile, int64_t b_step,
                int64_t depth, float* c, int64_t ldc, bool clear, Prefetcher* prefetch) {
  __m512 sums[ROWS][S];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
    for (int j = 0; j < S; j++) sums[i][j] = clear ? _mm512_setzero_ps() : _mm512_loadu_ps(c + (FIRST + i) * ldc + 16 * j);
#pragma GCC unroll 1
  for (int64_t k = 0; k < depth; k++) {
    const char* thirds[12];  // every third row of the two tiles: a row is a pointer and a distance that an instruction may name
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++) thirds[i] = a + i / 6 * a_tile + i % 6 * 3 * a_row;
#pragma GCC unroll 4
    for (int pair = 0; pair < 16; pair++) {
      __m512bh right[S];
#pragma GCC unroll 2
      for (int j = 0; j < S; j++) right[j] = (__m512bh)_mm512_load_si512((const __m512i*)(b + j * b_tile + 64 * pair));
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) {
        int32_t two;
        const int row = FIRST + i, third = row / 16 * 6 + row % 16 / 3;
        __builtin_memcpy(&two, thirds[third] + row % 16 % 3 * a_row + 4 * pair, 4);
        const __m512bh left = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 2
        for (int j = 0; j < S; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], left, right[j]);
      }
    }
    if (FIRST == 0) prefetch->step();
    a += a_step;
    b += b_step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
    for (int j = 0; j < S; j++) _mm512_storeu_ps(c + (FIRST + i) * ldc + 16 * j, sums[i][j]);
}

// C[16 R, 16 S] (+)= A B over `depth` steps of 32; tiles of A at a + i * a_tile + k * a_step (rows a_row bytes apart),
// tiles of B (64-byte rows) at b + j * b_tile + k * b_step. C: rows ldc floats apart. Sums are never kept: with one term there
// is nothing to keep them for.
template <int R, int S>
static void tiles(const char* a, int64_t a_tile, int64_t a_step, int64_t a_row, const char* b, int64_t b_tile, int64_t b_step,
                  int64_t depth, float* c, int64_t ldc, Start start, bool, Prefetcher* prefetch) {
  const bool clear = start == Start::clear;
#define ENTRGI_DOT(first, rows) dot<first, rows, S>(a, a_tile, a_step, a_row, b, b_tile, b_step, depth, c, ldc, clear, prefetch)
  if constexpr (S == 1) {  // 16 sums are in flight at least, 22 at most: more than the instruction takes cycles
    ENTRGI_DOT(0, 16);
    if constexpr (R == 2) ENTRGI_DOT(16, 16);
  } else if constexpr (R == 1) {
    ENTRGI_DOT(0, 8);
    ENTRGI_DOT(8, 8);
  } else {
    ENTRGI_DOT(0, 11);
    ENTRGI_DOT(11, 11);
    ENTRGI_DOT(22, 10);
  }
#undef ENTRGI_DOT
}
