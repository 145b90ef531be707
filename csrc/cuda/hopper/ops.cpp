// Hopper's products as operators of namespace entrgi_cuda. What calls them has checked shapes, types and alignment; here is
// checked again what would read or write elsewhere.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "jobs.h"

namespace {

using at::Tensor;
namespace hopper = entrgi::cuda::hopper;

void check(cudaError_t error) { TORCH_CHECK(error == cudaSuccess, "entrgi_cuda: ", cudaGetErrorString(error)); }

hopper::Matrix matrix(const Tensor& t, at::ScalarType type, const char* name) {
  const int64_t unit = 16 / t.element_size();
  TORCH_CHECK_VALUE(t.dim() == 2 && t.scalar_type() == type && (t.size(1) == 1 || t.stride(1) == 1) &&
                        t.stride(0) >= t.size(1) && t.stride(0) % unit == 0 && t.size(1) % 8 == 0 &&
                        reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 && t.size(0) < INT32_MAX - 512 &&
                        t.size(1) < INT32_MAX - 512,
                    "entrgi_cuda: ", name, " is ", t.scalar_type(), " ", t.sizes(), " with strides ", t.strides(),
                    ": expected ", type, " with dense rows, all of 16-byte multiples");
  return {t.data_ptr(), t.size(0), t.size(1), t.stride(0)};
}

float* floats(const Tensor& t, int64_t least, const char* name) {
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat && t.is_contiguous() && t.numel() >= least, "entrgi_cuda: ", name, " is ",
                    t.scalar_type(), " ", t.sizes(), ": expected ", least, " float32 entries");
  return t.data_ptr<float>();
}

template <cudaError_t (*LAUNCH)(const hopper::ForwardJob&, cudaStream_t)>
void forward_product_(const Tensor& logits, const Tensor& table, const Tensor& maximum, const Tensor& logsum,
                      const Tensor& soft, const Tensor& parts, int64_t count, int64_t slices, int64_t slice_length,
                      double temperature) {
  const c10::cuda::CUDAGuard guard(logits.device());
  hopper::ForwardJob job;
  job.logits = matrix(logits, at::kBFloat16, "logits");
  job.table = matrix(table, at::kBFloat16, "table");
  const int64_t n = logits.size(0), v = logits.size(1), d = table.size(1);
  TORCH_CHECK_VALUE(table.size(0) == v && count >= 1 && count <= 1024 && slices >= 1 && slice_length > 0 &&
                        slice_length % 64 == 0 && slice_length < INT32_MAX / 2 && count * slices * slice_length >= v &&
                        count * slices * slice_length < INT32_MAX && (count - 1) * slices * slice_length < v,
                    "entrgi_cuda: ", count, " times ", slices, " slices of ", slice_length, " do not make a vocabulary of ",
                    v, " with something in each part");
  job.maximum = floats(maximum, n, "maximum");
  job.logsum = floats(logsum, n, "logsum");
  job.soft = floats(soft, n * d, "soft");
  job.parts = floats(parts, (count - 1) * n * d, "parts");
  job.parts_count = static_cast<int32_t>(count);
  job.slices = static_cast<int32_t>(slices);
  job.slice_length = static_cast<int32_t>(slice_length);
  job.inverse = static_cast<float>(1 / temperature);
  check(LAUNCH(job, c10::cuda::getCurrentCUDAStream().stream()));
}

hopper::UpdateJob update_job(const Tensor& logits, const Tensor& grad, const Tensor& table, const Tensor& delta,
                             const Tensor& lse, const std::optional<Tensor>& exp_avg, const std::optional<Tensor>& exp_avg_sq,
                             bool reads, bool writes, double temperature, double step_size, double root_correction,
                             double beta1, double beta2, double eps) {
  hopper::UpdateJob job;
  job.logits = matrix(logits, at::kBFloat16, "logits");
  job.grad = matrix(grad, at::kBFloat16, "grad");
  job.table = matrix(table, at::kBFloat16, "table");
  TORCH_CHECK_VALUE(grad.size(0) == logits.size(0) && table.size(0) == logits.size(1) && grad.size(1) == table.size(1),
                    "entrgi_cuda: grad ", grad.sizes(), " and table ", table.sizes(), " do not fit logits ", logits.sizes());
  job.delta = floats(delta, logits.size(0), "delta");
  job.lse = floats(lse, logits.size(0), "lse");
  if (reads || writes) {
    TORCH_CHECK_VALUE(exp_avg && exp_avg_sq && exp_avg->sizes() == logits.sizes() && exp_avg_sq->sizes() == logits.sizes(),
                      "entrgi_cuda: moments are missing or do not have the logits' shape");
    const at::ScalarType type = exp_avg->scalar_type();
    TORCH_CHECK_TYPE(type == at::kBFloat16 || type == at::kFloat, "entrgi_cuda: moments are ", type);
    job.exp_avg = matrix(*exp_avg, type, "exp_avg");
    job.exp_avg_sq = matrix(*exp_avg_sq, type, "exp_avg_sq");
    job.wide_moments = type == at::kFloat;
    job.reads = reads;
    job.writes = writes;
  }
  job.inverse = static_cast<float>(1 / temperature);
  job.step_size = static_cast<float>(step_size);
  job.root_correction = static_cast<float>(root_correction);
  job.beta1 = static_cast<float>(beta1);
  job.beta2 = static_cast<float>(beta2);
  job.eps = static_cast<float>(eps);
  return job;
}

int multiprocessors(const c10::cuda::CUDAGuard& guard) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, guard.current_device().index()));
  return count;
}

void guidance_update_(const Tensor& logits, const Tensor& grad, const Tensor& table, const Tensor& delta, const Tensor& lse,
                      const std::optional<Tensor>& exp_avg, const std::optional<Tensor>& exp_avg_sq, bool reads, bool writes,
                      double temperature, double step_size, double root_correction, double beta1, double beta2, double eps) {
  const c10::cuda::CUDAGuard guard(logits.device());
  const hopper::UpdateJob job = update_job(logits, grad, table, delta, lse, exp_avg, exp_avg_sq, reads, writes, temperature,
                                           step_size, root_correction, beta1, beta2, eps);
  check(hopper::launch_update(job, multiprocessors(guard), c10::cuda::getCurrentCUDAStream().stream()));
}

#ifdef ENTRGI_HOPPER_CANDIDATES
void update_candidate_(int64_t candidate, const Tensor& logits, const Tensor& grad, const Tensor& table, const Tensor& delta,
                       const Tensor& lse, const std::optional<Tensor>& exp_avg, const std::optional<Tensor>& exp_avg_sq,
                       bool reads, bool writes, double temperature, double step_size, double root_correction, double beta1,
                       double beta2, double eps) {
  const c10::cuda::CUDAGuard guard(logits.device());
  const hopper::UpdateJob job = update_job(logits, grad, table, delta, lse, exp_avg, exp_avg_sq, reads, writes, temperature,
                                           step_size, root_correction, beta1, beta2, eps);
  check(hopper::launch_update_candidate(candidate, job, multiprocessors(guard), c10::cuda::getCurrentCUDAStream().stream()));
}
#endif

bool compiled() { return hopper::compiled(); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(entrgi_cuda, m) {
  m.def("hopper_compiled() -> bool", &compiled);
  m.def(
      "hopper_forward_(Tensor logits, Tensor table, Tensor maximum, Tensor logsum, Tensor(a!) soft, Tensor(b!) parts, "
      "int count, int slices, int slice_length, float temperature) -> ()");
  m.def(
      "hopper_update_(Tensor(a!) logits, Tensor grad, Tensor table, Tensor delta, Tensor lse, Tensor(b!)? exp_avg, "
      "Tensor(c!)? exp_avg_sq, bool reads, bool writes, float temperature, float step_size, float root_correction, "
      "float beta1, float beta2, float eps) -> ()");
#ifdef ENTRGI_HOPPER_CANDIDATES
  m.def(
      "hopper_forward_candidate_(Tensor logits, Tensor table, Tensor maximum, Tensor logsum, Tensor(a!) soft, Tensor(b!) parts, "
      "int count, int slices, int slice_length, float temperature) -> ()");
  m.def("hopper_update_candidates() -> str[]", &hopper::update_candidates);
  m.def(
      "hopper_update_candidate_(int candidate, Tensor(a!) logits, Tensor grad, Tensor table, Tensor delta, Tensor lse, "
      "Tensor(b!)? exp_avg, Tensor(c!)? exp_avg_sq, bool reads, bool writes, float temperature, float step_size, "
      "float root_correction, float beta1, float beta2, float eps) -> ()");
#endif
}

TORCH_LIBRARY_IMPL(entrgi_cuda, CUDA, m) {
  m.impl("hopper_forward_", &forward_product_<hopper::launch_forward>);
  m.impl("hopper_update_", &guidance_update_);
#ifdef ENTRGI_HOPPER_CANDIDATES
  m.impl("hopper_forward_candidate_", &forward_product_<hopper::launch_forward_candidate>);
  m.impl("hopper_update_candidate_", &update_candidate_);
#endif
}
