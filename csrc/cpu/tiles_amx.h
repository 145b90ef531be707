// Tiles of bf16.h in the processor's AMX registers.

// Products take up to so many terms of a number that is no bf16, and so few rows of p or the gradient.
constexpr int64_t TILED_TERMS = 3, TILED_ROWS = 1;

#if defined(ENTRGI_SOFTWARE_TILES)
#include "software_tiles.h"
INLINE void tiles_begin() {}
INLINE void tiles_end() {}
#else
struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
INLINE void tiles_begin() {
  static const TileConfig config;
  asm volatile("ldtilecfg %0" ::"m"(config));
}
INLINE void tiles_end() { asm volatile("tilerelease" ::: "memory"); }
#endif
// GCC's tile loads do not tell the compiler that they read memory.
#define ENTRGI_FENCE asm volatile("" ::: "memory")

// C[16 R, 16 S] (+)= A B over `depth` steps of 32; tiles of A at a + i * a_tile + k * a_step (rows a_row bytes apart),
// tiles of B (64-byte rows) at b + j * b_tile + k * b_step. C: rows ldc floats apart.
template <int R, int S>
static void tiles(const char* a, int64_t a_tile, int64_t a_step, int64_t a_row, const char* b, int64_t b_tile,
                  int64_t b_step, int64_t depth, float* c, int64_t ldc, Start start, bool write, Prefetcher* prefetch) {
  const int64_t row = ldc * 4;
  ENTRGI_FENCE;
  if (start == Start::load) {
    _tile_loadd(0, c, row);
    if (S > 1) _tile_loadd(1, c + 16, row);
    if (R > 1) _tile_loadd(2, c + 16 * ldc, row);
    if (R > 1 && S > 1) _tile_loadd(3, c + 16 * ldc + 16, row);
  } else if (start == Start::clear) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k++) {
    _tile_loadd(4, a, a_row);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (S > 1) {
      _tile_loadd(7, b + b_tile, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (R > 1) {
      _tile_loadd(5, a + a_tile, a_row);
      _tile_dpbf16ps(2, 5, 6);
      if (S > 1) _tile_dpbf16ps(3, 5, 7);
    }
    prefetch->step();
    a += a_step;
    b += b_step;
  }
  if (write) {
    _tile_stored(0, c, row);
    if (S > 1) _tile_stored(1, c + 16, row);
    if (R > 1) _tile_stored(2, c + 16 * ldc, row);
    if (R > 1 && S > 1) _tile_stored(3, c + 16 * ldc + 16, row);
  }
  ENTRGI_FENCE;
}
