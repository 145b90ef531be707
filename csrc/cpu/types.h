// Plain data that the drivers (baseline code, torch-aware) and the kernels (one translation unit per instruction set)
// exchange. No torch, no std templates: everything here is safe to see from a unit compiled for AVX-512.
#pragma once
#include <stdint.h>

namespace entrgi {

enum class Dtype : int { f64 = 0, f32 = 1, bf16 = 2, f16 = 3 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline int64_t size_of(Dtype t) { return t == Dtype::f64 ? 8 : t == Dtype::f32 ? 4 : 2; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A matrix in memory whose inner stride is one element; `stride` is that between rows, in elements.
struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;
  Dtype dtype = Dtype::f32;
};

// Row statistics. Every pointer may be null (not wanted); arrays are acc: double for f64 logits, float otherwise.
struct StatsJob {
  Matrix logits;
  int64_t n = 0, v = 0;
  double temperature = 1.0;
  void* maximum = nullptr;         // raw logit
  void* total = nullptr;           // sum of exp((x - maximum) / temperature)
  void* lse = nullptr;             // at `temperature`
  void* entropy = nullptr;         // at `temperature`, nats
  void* entropy_unit = nullptr;    // at temperature 1, nats
  int64_t* argmax = nullptr;
};

struct SampleJob {
  Matrix logits;
  int64_t n = 0, v = 0;
  double temperature = 1.0;
  int64_t top_k = 0;
  double top_p = 1.0;
  const void* maximum = nullptr;  // from StatsJob, acc
  const void* total = nullptr;
  uint64_t seed = 0;
  uint32_t step = 0;
  const int64_t* rows = nullptr;
  int64_t* tokens = nullptr;
};

enum class Confidence : int { entropy = 0, maskgit_plus = 1, topk_margin = 2, anchor = 3 };

struct ConfidenceJob {
  SampleJob filter;  // rng, rows unused; tokens are read
  Confidence alg = Confidence::entropy;
  void* out = nullptr;  // acc
};

// log p = (x - shift) / temperature - rest, [n] acc each. Shift 0 and the log-sum-exp, but where the latter is so large
// that it has no digits left for the sum's logarithm: there the row's maximum, and that logarithm.
struct Normaliser {
  const void *shift = nullptr, *rest = nullptr;
};

struct EntropyBackwardJob {
  Matrix logits, out;
  int64_t n = 0, v = 0;
  double temperature = 1.0;
  Normaliser norm;
  const void *entropy = nullptr, *grad_lse = nullptr, *grad_entropy = nullptr;  // acc
};

// soft = softmax(logits / temperature) @ embedding. A unit is (split of V) x (group of columns); each split has its own
// accumulator, and the splits are added in order afterwards: no number depends on how many threads there are.
struct ForwardJob {
  Matrix logits, embedding;
  int64_t n = 0, v = 0, d = 0;
  double temperature = 1.0;
  const void *maximum = nullptr, *total = nullptr;  // acc
  int64_t splits = 1, groups = 1;
  void* accumulators = nullptr;  // [splits][round_up(n, row_pad)][columns] acc, columns = round_up(d, column_pad)
  // The rest: the combination of splits with the hard token, by row.
  void* soft = nullptr;            // [n, d] acc
  const int64_t* tokens = nullptr;  // null: no interpolation wanted
  const void* weight = nullptr;     // [n] acc
  Matrix mixed;                     // [n, d], or more rows where `places` tells
  const int64_t* places = nullptr;  // [n], each row's place in `mixed`; null: in order
};

struct Adam {
  double step_size = 0, sqrt_correction2 = 1, beta1 = 0, beta2 = 0, eps = 0;
  bool reads = false, writes = false;  // the moments: a first step finds none, a last one leaves none
};

// Gradient of the logits: p (grad . E_v - baseline) / temperature, then either stored or fed to Adam. Or, where `linear`,
// logits += scale (grad . E_v - baseline): neither the distribution nor Adam takes part.
struct BackwardJob {
  Matrix logits, embedding, out;  // out.data null: in place on logits
  Matrix exp_avg, exp_avg_sq;     // data null where they are neither read nor written
  Matrix grad;                    // [n, d]
  int64_t n = 0, v = 0, d = 0;
  double temperature = 1.0;
  Normaliser norm;
  const void* baseline = nullptr;  // acc
  bool linear = false;
  double scale = 0;
  Adam adam;
  void* packed = nullptr;  // the gradient as the kernels want it, filled by pack_gradient
};

// grad_embedding = p^T grad
struct TableJob {
  Matrix logits, grad, out;
  int64_t n = 0, v = 0, d = 0;
  double temperature = 1.0;
  Normaliser norm;
  void* packed = nullptr;
};

// What one instruction set offers. Every function is single-threaded; drivers spread rows or units over threads.
struct Kernels {
  const char* name;
  void (*stats)(const StatsJob&, int64_t begin, int64_t end);
  int64_t (*filter_scratch)(const SampleJob&);
  void (*sample)(const SampleJob&, int64_t begin, int64_t end, void* scratch);
  void (*confidence)(const ConfidenceJob&, int64_t begin, int64_t end, void* scratch);
  void (*entropy_backward)(const EntropyBackwardJob&, int64_t begin, int64_t end);

  void (*forward_padding)(const ForwardJob&, int64_t* rows, int64_t* columns);  // of the accumulators
  int64_t (*forward_scratch)(const ForwardJob&);
  void (*forward_unit)(const ForwardJob&, int64_t unit, void* scratch);
  void (*forward_combine)(const ForwardJob&, int64_t begin, int64_t end);

  int64_t (*gradient_pack_size)(const BackwardJob&);
  void (*pack_gradient)(const BackwardJob&);
  int64_t (*backward_units)(const BackwardJob&);
  int64_t (*backward_scratch)(const BackwardJob&);
  void (*backward_unit)(const BackwardJob&, int64_t unit, void* scratch);

  int64_t (*table_pack_size)(const TableJob&);
  void (*pack_table)(const TableJob&);
  int64_t (*table_units)(const TableJob&);
  int64_t (*table_scratch)(const TableJob&);
  void (*table_unit)(const TableJob&, int64_t unit, void* scratch);
};

// Constants and not functions: nothing of a unit may run before cpuid has been asked whether this machine can.
extern const Kernels* const kernels_baseline;
extern const Kernels* const kernels_avx2;  // null where not compiled in
extern const Kernels* const kernels_avx512;
// AVX-512's, but for products with a bf16 table: by dot products of pairs, or in AMX tiles.
extern const Kernels* const kernels_avx512_bf16;
extern const Kernels* const kernels_amx;
}  // namespace entrgi
