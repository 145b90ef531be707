// What the torch-aware bindings and the kernels exchange: plain pointers and numbers, no torch.
#pragma once
#include <stdint.h>
#ifdef ENTRGI_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace entrgi::cuda {

enum class Type : int { f32 = 0, bf16 = 1, f16 = 2 };

// N rows of V logits, dense within a row; `stride` is the distance of rows, in entries (any, zero included).
struct Rows {
  const void* data = nullptr;
  int64_t stride = 0;
  int64_t n = 0;
  int32_t v = 0;
  Type type = Type::f32;
};

// Statistics that a launch leaves: float [STATISTICS][n] in this order. All NaN for a bad row (NaN or +inf in it, or no
// finite entry). `entropy` is in nats; logsum = log sum exp((x - maximum) / temperature); a trailing 2 is for the second
// temperature.
enum Statistic : int { MAXIMUM = 0, LSE = 1, ENTROPY = 2, LOGSUM = 3, LSE2 = 4, LOGSUM2 = 5, STATISTICS = 6 };

struct StatisticsJob {
  Rows logits;
  float temperature = 1;
  float temperature2 = 0;     // 0: none, and LSE2 and LOGSUM2 are not written
  float* out = nullptr;
  int64_t* argmax = nullptr;  // the lowest index of the maximum, `bad_index` for a bad row; null: not wanted
  int64_t bad_index = 0;
  int32_t splits = 1;         // blocks that share a row
  void* workspace = nullptr;  // statistics_workspace bytes; null where splits is 1
};

// What top-k and top-p keep of softmax(logits / temperature): top_k >= v and top_p >= 1 mean no filter.
struct FilterJob {
  Rows logits;
  float temperature = 1;
  int64_t top_k = INT64_MAX;
  double top_p = 1;
};

struct DrawJob {
  FilterJob filter;
  const int64_t* rng = nullptr;   // (seed, step), read on the device: a captured graph draws anew when it is changed
  const int64_t* rows = nullptr;  // [n] row keys
  int64_t* tokens = nullptr;      // [n]; -1 for a bad row
  // Where `statistics` is not null the launch also leaves what StatisticsJob would for temperatures 1 (entropy) and
  // `filter.temperature` (the second).
  float* statistics = nullptr;
  int64_t* argmax = nullptr;
};

enum class Confidence : int { entropy = 0, maskgit_plus = 1, topk_margin = 2, anchor = 3 };

struct ConfidenceJob {
  FilterJob filter;
  const int64_t* tokens = nullptr;
  Confidence alg = Confidence::entropy;
  float* out = nullptr;  // [n]
};

// Gradient of (log-sum-exp, entropy); `out` is dense [n][v] of the logits' type.
struct EntropyBackwardJob {
  Rows logits;
  float temperature = 1;
  const float *lse = nullptr, *entropy = nullptr, *grad_lse = nullptr, *grad_entropy = nullptr;
  void* out = nullptr;
};

// How many blocks share a row of `v` entries, so that `n` rows fill `multiprocessors`.
int32_t statistics_splits(int64_t n, int32_t v, int multiprocessors);
int64_t statistics_workspace(int64_t n, int32_t splits);  // bytes

// Each enqueues its work on the stream and returns without waiting; nothing is launched for n = 0.
cudaError_t launch_statistics(const StatisticsJob& job, cudaStream_t stream);
cudaError_t launch_draw(const DrawJob& job, cudaStream_t stream);
cudaError_t launch_confidence(const ConfidenceJob& job, cudaStream_t stream);
cudaError_t launch_entropy_backward(const EntropyBackwardJob& job, cudaStream_t stream);

}  // namespace entrgi::cuda
