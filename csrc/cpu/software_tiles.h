// AMX's tile registers in plain memory, for builds with -DENTRGI_SOFTWARE_TILES: machines without AMX then run what is written for
// it, and AddressSanitizer sees what tile loads read (.ci/sanitize). Included inside namespace entrgi::ENTRGI_ISA.
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps

static thread_local struct {
  char bytes[16][64];
} software_tiles[8];

static void _tile_loadd(int tile, const void* from, int64_t stride) {
  for (int r = 0; r < 16; r++) __builtin_memcpy(software_tiles[tile].bytes[r], (const char*)from + r * stride, 64);
}
static void _tile_stored(int tile, void* to, int64_t stride) {
  for (int r = 0; r < 16; r++) __builtin_memcpy((char*)to + r * stride, software_tiles[tile].bytes[r], 64);
}
static void _tile_zero(int tile) { software_tiles[tile] = {}; }
static void _tile_dpbf16ps(int c, int a, int b) {
  for (int m = 0; m < 16; m++) {
    __m512 sums = _mm512_loadu_ps(software_tiles[c].bytes[m]);
    for (int k = 0; k < 16; k++) {
      int32_t pair;
      __builtin_memcpy(&pair, software_tiles[a].bytes[m] + 4 * k, 4);
      sums = _mm512_dpbf16_ps(sums, (__m512bh)_mm512_set1_epi32(pair),
                              (__m512bh)_mm512_loadu_si512(software_tiles[b].bytes[k]));
    }
    _mm512_storeu_ps(software_tiles[c].bytes[m], sums);
  }
}
