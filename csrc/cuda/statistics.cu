// Launchers of the row statistics and of their gradient.
#include "plans.cuh"
#include "statistics.cuh"

namespace entrgi::cuda {

int32_t statistics_splits(int64_t n, int32_t v, int multiprocessors) {
  if (n == 0) return 1;
  const int64_t wanted = static_cast<int64_t>(multiprocessors) * STATISTICS_PLAN.blocks / n;
  const int64_t possible = v / LEAST_SLICE < MOST_SPLITS ? v / LEAST_SLICE : MOST_SPLITS;
  const int64_t splits = wanted < possible ? wanted : possible;
  return static_cast<int32_t>(splits < 1 ? 1 : splits);
}

int64_t statistics_workspace(int64_t n, int32_t splits) {
  return splits == 1 ? 0 : n * splits * static_cast<int64_t>(sizeof(Moments)) + n * static_cast<int64_t>(sizeof(unsigned));
}

template <typename T, bool SECOND>
static cudaError_t statistics(const StatisticsJob& job, cudaStream_t stream) {
  constexpr Plan P = STATISTICS_PLAN;
  return launch(statistics_kernel<T, P.threads, P.blocks, SECOND>, job.logits.n * job.splits, P.threads,
                sizeof(StatisticsShared<P.threads>), stream, job);
}

cudaError_t launch_statistics(const StatisticsJob& job, cudaStream_t stream) {
  if (job.splits > 1) {
    unsigned char* arrived = static_cast<unsigned char*>(job.workspace) + job.logits.n * job.splits * sizeof(Moments);
    const cudaError_t error = cudaMemsetAsync(arrived, 0, job.logits.n * sizeof(unsigned), stream);
    if (error != cudaSuccess) return error;
  }
  const bool second = job.temperature2 > 0;
  switch (job.logits.type) {
    case Type::f32: return second ? statistics<float, true>(job, stream) : statistics<float, false>(job, stream);
    case Type::bf16: return second ? statistics<bf16, true>(job, stream) : statistics<bf16, false>(job, stream);
    case Type::f16: return second ? statistics<f16, true>(job, stream) : statistics<f16, false>(job, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename T>
static cudaError_t entropy_backward(const EntropyBackwardJob& job, cudaStream_t stream) {
  constexpr Plan P = ELEMENTWISE_PLAN;
  const int64_t slices = (job.logits.v - 1) / ELEMENTWISE_SLICE + 1;
  return launch(entropy_backward_kernel<T, P.threads, P.blocks, ELEMENTWISE_SLICE>, job.logits.n * slices, P.threads, 0,
                stream, job);
}

cudaError_t launch_entropy_backward(const EntropyBackwardJob& job, cudaStream_t stream) {
  switch (job.logits.type) {
    case Type::f32: return entropy_backward<float>(job, stream);
    case Type::bf16: return entropy_backward<bf16>(job, stream);
    case Type::f16: return entropy_backward<f16>(job, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace entrgi::cuda
