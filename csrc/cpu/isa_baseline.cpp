// Kernels for what every machine of the architecture has: SSE2 on x86-64, whatever the compiler makes of 16-byte vectors
// elsewhere (NEON on aarch64).
#include <math.h>
#include <stdint.h>

#include "types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define ENTRGI_LEVEL 0
#define ENTRGI_ISA baseline
#define ENTRGI_ISA_NAME "baseline"
#include "kernels.h"

constinit const entrgi::Kernels* const entrgi::kernels_baseline = &entrgi::baseline::table;
