// Launchers of the draw and of the confidences.
#include "plans.cuh"
#include "sampling.cuh"

namespace entrgi::cuda {

using Shared = FilterShared<DRAW_PLAN.threads, DRAW_CAPACITY>;

static_assert(DRAW_PLAN.blocks * (sizeof(Shared) + RESERVED_SHARED) <= LEAST_SHARED, "the planned blocks do not fit");

static size_t shared_size(const FilterJob& job) {
  return job.top_p < 1.0 || job.top_k < job.logits.v ? sizeof(Shared) : offsetof(Shared, value);
}

template <typename T>
static cudaError_t draw(const DrawJob& job, cudaStream_t stream) {
  constexpr Plan P = DRAW_PLAN;
  const auto kernel = job.statistics ? draw_kernel<T, P.threads, P.blocks, DRAW_CAPACITY, true>
                                     : draw_kernel<T, P.threads, P.blocks, DRAW_CAPACITY, false>;
  return launch(kernel, job.filter.logits.n, P.threads, shared_size(job.filter), stream, job);
}

cudaError_t launch_draw(const DrawJob& job, cudaStream_t stream) {
  switch (job.filter.logits.type) {
    case Type::f32: return draw<float>(job, stream);
    case Type::bf16: return draw<bf16>(job, stream);
    case Type::f16: return draw<f16>(job, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename T>
static cudaError_t confidence(const ConfidenceJob& job, cudaStream_t stream) {
  constexpr Plan P = DRAW_PLAN;
  return launch(confidence_kernel<T, P.threads, P.blocks, DRAW_CAPACITY>, job.filter.logits.n, P.threads,
                shared_size(job.filter), stream, job);
}

cudaError_t launch_confidence(const ConfidenceJob& job, cudaStream_t stream) {
  switch (job.filter.logits.type) {
    case Type::f32: return confidence<float>(job, stream);
    case Type::bf16: return confidence<bf16>(job, stream);
    case Type::f16: return confidence<f16>(job, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace entrgi::cuda
