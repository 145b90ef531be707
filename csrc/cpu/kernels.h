// The body of a translation unit: all kernels for one instruction set, and the table that exports them.
//
// The including unit has already included <math.h>, <immintrin.h> (on x86) and types.h, set the target by pragma, and
// defined ENTRGI_ISA (a namespace), ENTRGI_ISA_NAME and ENTRGI_LEVEL (0: vectors of 16 bytes and no intrinsics, 2: AVX2, 3:
// AVX-512; the compiler's own macros do not follow the pragma before GCC 13). With ENTRGI_BF16 it gets products with bf16 tables
// alone (and with ENTRGI_AMX in AMX tiles), the rest being AVX-512's.
//
// Nothing of a unit runs before cpuid has been asked: its table is a constant, and it has no initialiser. Nothing that lives
// outside namespace entrgi::ENTRGI_ISA may be defined from here on: an inline function compiled for AVX-512 could otherwise be the
// copy that the linker keeps. tests/backends/test_native_build.py looks for both in the built extension.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors only cross functions that are always inlined
#pragma GCC diagnostic ignored "-Wignored-attributes"
#endif

namespace entrgi {
namespace ENTRGI_ISA {

#include "vec.h"
#include "stats.h"
#include "filter.h"
#include "gemm.h"
#include "backward.h"

#if defined(ENTRGI_BF16)
#include "bf16.h"
#else
#define ENTRGI_BY_LOGITS(dtype, call)                       \
  switch (dtype) {                                          \
    case Dtype::f64: { typedef double T; return call; }     \
    case Dtype::f32: { typedef float T; return call; }      \
    case Dtype::bf16: { typedef bf16 T; return call; }      \
    case Dtype::f16: { typedef f16 T; return call; }        \
  }
#define ENTRGI_BY_ACC(dtype, call)                          \
  if ((dtype) == Dtype::f64) {                              \
    typedef double A;                                       \
    return call;                                            \
  } else {                                                  \
    typedef float A;                                        \
    return call;                                            \
  }

static void stats(const StatsJob& j, int64_t b, int64_t e) { ENTRGI_BY_LOGITS(j.logits.dtype, stats_rows<T>(j, b, e)) }
static int64_t filter_scratch(const SampleJob& j) {
  ENTRGI_BY_LOGITS(j.logits.dtype, (int64_t)sizeof(Scratch<T>))
  return 0;
}
static void sample(const SampleJob& j, int64_t b, int64_t e, void* s) {
  ENTRGI_BY_LOGITS(j.logits.dtype, sample_rows<T>(j, b, e, s))
}
static void confidence(const ConfidenceJob& j, int64_t b, int64_t e, void* s) {
  ENTRGI_BY_LOGITS(j.filter.logits.dtype, confidence_rows<T>(j, b, e, s))
}
static void entropy_backward(const EntropyBackwardJob& j, int64_t b, int64_t e) {
  ENTRGI_BY_LOGITS(j.logits.dtype, entropy_backward_rows<T>(j, b, e))
}

static void forward_padding(const ForwardJob& j, int64_t* rows, int64_t* columns) {
  ENTRGI_BY_ACC(j.logits.dtype, forward_padding_plain<A>(j, rows, columns))
}
static int64_t forward_scratch(const ForwardJob& j) {
  ENTRGI_BY_ACC(j.logits.dtype, forward_scratch_plain<A>(j))
}
static void forward_unit(const ForwardJob& j, int64_t u, void* s) {
  ENTRGI_BY_LOGITS(j.logits.dtype, forward_unit_plain<T>(j, u, s))
}
static void forward_combine(const ForwardJob& j, int64_t b, int64_t e) {
  ENTRGI_BY_ACC(j.logits.dtype, forward_combine_plain<A>(j, b, e))
}
static int64_t gradient_pack_size(const BackwardJob& j) {
  ENTRGI_BY_ACC(j.logits.dtype, gradient_pack_size_plain<A>(j))
}
static void pack_gradient(const BackwardJob& j) {
  ENTRGI_BY_ACC(j.logits.dtype, pack_gradient_plain<A>(j))
}
static int64_t backward_units(const BackwardJob& j) {
  return backward_units_any(j);
}
static int64_t backward_scratch(const BackwardJob& j) {
  ENTRGI_BY_ACC(j.logits.dtype, backward_scratch_plain<A>(j))
}
static void backward_unit(const BackwardJob& j, int64_t u, void* s) {
  ENTRGI_BY_LOGITS(j.logits.dtype, backward_unit_plain<T>(j, u, s))
}
static int64_t table_pack_size(const TableJob& j) {
  ENTRGI_BY_ACC(j.logits.dtype, table_pack_size_plain<A>(j))
}
static void pack_table(const TableJob& j) {
  ENTRGI_BY_ACC(j.logits.dtype, pack_table_plain<A>(j))
}
static int64_t table_units(const TableJob& j) {
  return table_units_any(j);
}
static int64_t table_scratch(const TableJob& j) {
  ENTRGI_BY_ACC(j.logits.dtype, table_scratch_plain<A>(j))
}
static void table_unit(const TableJob& j, int64_t u, void* s) {
  ENTRGI_BY_LOGITS(j.logits.dtype, table_unit_plain<T>(j, u, s))
}

#endif

static constexpr Kernels table = {
    ENTRGI_ISA_NAME,  stats,           filter_scratch, sample,         confidence,       entropy_backward,
    forward_padding,  forward_scratch, forward_unit,   forward_combine, gradient_pack_size, pack_gradient,
    backward_units,   backward_scratch, backward_unit, table_pack_size, pack_table,       table_units,
    table_scratch,    table_unit,
};

}  // namespace ENTRGI_ISA
}  // namespace entrgi
