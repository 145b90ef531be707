// What the bindings hand to Hopper's products: plain pointers and numbers, no torch.
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>

#ifdef ENTRGI_HOPPER_CANDIDATES
#include <string>
#include <vector>
#endif

namespace entrgi::cuda::hopper {

// A matrix of bfloat16 with dense rows: base and distance of rows are multiples of 16 bytes.
struct Matrix {
  void* data = nullptr;
  int64_t rows = 0, columns = 0, stride = 0;  // in entries
};

// soft[n, d] = exp((logits - maximum) / temperature - logsum) @ table, in slices of the vocabulary.
struct ForwardJob {
  Matrix logits, table;
  const float *maximum = nullptr, *logsum = nullptr;  // [n]
  float* soft = nullptr;                              // [n][d], of the first part
  float* parts = nullptr;                             // [parts_count - 1][n][d], of the others
  int32_t parts_count = 1;                            // none of them is empty
  int32_t slices = 1;        // 1, 2, 4 or 8, whose sums are added before they are written
  int32_t slice_length = 0;  // a multiple of 64
  float inverse = 1;                                  // 1 / temperature
};

// Adam on the logits and moments, all in place, from grad @ table^T: a null moment is a step without moments (M = 1).
struct UpdateJob {
  Matrix logits, grad, table, exp_avg, exp_avg_sq;
  const float *delta = nullptr, *lse = nullptr;  // [n]: grad . soft, and log-sum-exp at the temperature
  bool reads = false, writes = false, wide_moments = false;  // wide: float32
  float inverse = 1, step_size = 0, root_correction = 1, beta1 = 0, beta2 = 0, eps = 0;
};

// Each enqueues its work on the stream and returns without waiting. Compute capability 9.0 only.
cudaError_t launch_forward(const ForwardJob& job, cudaStream_t stream);
cudaError_t launch_update(const UpdateJob& job, int multiprocessors, cudaStream_t stream);
#ifdef ENTRGI_HOPPER_CANDIDATES
// The forward product with blocks in pairs; of one slice.
cudaError_t launch_forward_candidate(const ForwardJob& job, cudaStream_t stream);
// The update with other tiles, by their place in the list of names (candidates.cu).
std::vector<std::string> update_candidates();
cudaError_t launch_update_candidate(int64_t candidate, const UpdateJob& job, int multiprocessors, cudaStream_t stream);
#endif

// Whether this build holds machine code for compute capability 9.0 (sm_90a), which nothing else can stand in for.
bool compiled();

}  // namespace entrgi::cuda::hopper
