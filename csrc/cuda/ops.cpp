// The raw functions of entrgi_kernels.backends.cuda, registered in namespace entrgi_cuda: they allocate, fill in a job and
// enqueue it on the current stream. Nothing here waits for the device.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "jobs.h"

namespace {
void check(cudaError_t error) { TORCH_CHECK(error == cudaSuccess, "entrgi_cuda: ", cudaGetErrorString(error)); }
}  // namespace

#ifdef ENTRGI_EMULATION
// Tests link these functions with the emulated kernels and call them with CPU tensors.
#define ENTRGI_KEY CPU
namespace {
struct Device {
  explicit Device(const at::Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
  int multiprocessors() const { return 8; }
};
}  // namespace
#else
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#define ENTRGI_KEY CUDA
namespace {
// The tensor's device, current while this lives.
class Device {
 public:
  explicit Device(const at::Tensor& t) : guard_(t.device()) {}
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }
  int multiprocessors() const {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, guard_.current_device().index()));
    return count;
  }

 private:
  c10::cuda::CUDAGuard guard_;
};
}  // namespace
#endif

namespace {

using at::Tensor;
namespace kernels = entrgi::cuda;

// The tensor itself when its rows are dense (any distance between rows, zero included), else a copy.
Tensor with_dense_rows(const Tensor& t) { return t.size(1) > 1 && t.stride(1) != 1 ? t.contiguous() : t; }

kernels::Rows rows_of(const Tensor& t) {
  TORCH_CHECK_VALUE(t.dim() == 2 && t.size(1) >= 1 && t.size(1) <= INT32_MAX - (1 << 16),
                    "entrgi_cuda: logits of shape ", t.sizes(), ": expected [N, V] with 1 <= V < 2^31 - 2^16");
  kernels::Rows rows;
  rows.data = t.data_ptr();
  rows.stride = t.stride(0);
  rows.n = t.size(0);
  rows.v = static_cast<int32_t>(t.size(1));
  switch (t.scalar_type()) {
    case at::kFloat: rows.type = kernels::Type::f32; break;
    case at::kBFloat16: rows.type = kernels::Type::bf16; break;
    case at::kHalf: rows.type = kernels::Type::f16; break;
    default: TORCH_CHECK_TYPE(false, "entrgi_cuda: logits are ", t.scalar_type(), ": expected float32, bfloat16, float16");
  }
  return rows;
}

// 1 / temperature has to be a float32.
float as_temperature(double temperature) { return static_cast<float>(std::max(temperature, 1e-37)); }

Tensor floats(const Tensor& like, at::IntArrayRef shape) { return at::empty(shape, like.options().dtype(at::kFloat)); }
Tensor longs(const Tensor& like) { return at::empty({like.size(0)}, like.options().dtype(at::kLong)); }

kernels::FilterJob filter_job(const Tensor& logits, double temperature, int64_t top_k, double top_p) {
  kernels::FilterJob job;
  job.logits = rows_of(logits);
  job.temperature = as_temperature(temperature);
  if (top_k > 0) job.top_k = top_k;
  job.top_p = top_p;
  return job;
}

std::tuple<Tensor, Tensor> row_statistics(const Tensor& logits_, double temperature, double temperature2,
                                          int64_t bad_index) {
  const Device device(logits_);
  const Tensor logits = with_dense_rows(logits_);
  kernels::StatisticsJob job;
  job.logits = rows_of(logits);
  job.temperature = as_temperature(temperature);
  job.temperature2 = temperature2 > 0 ? as_temperature(temperature2) : 0.0f;
  Tensor out = floats(logits, {kernels::STATISTICS, job.logits.n}), argmax = longs(logits);
  job.out = out.data_ptr<float>();
  job.argmax = argmax.data_ptr<int64_t>();
  job.bad_index = bad_index;
  job.splits = kernels::statistics_splits(job.logits.n, job.logits.v, device.multiprocessors());
  Tensor workspace =
      at::empty({kernels::statistics_workspace(job.logits.n, job.splits)}, logits.options().dtype(at::kByte));
  job.workspace = workspace.data_ptr();
  check(kernels::launch_statistics(job, device.stream()));
  return {out, argmax};
}

Tensor softmax_entropy_backward(const Tensor& logits_, const Tensor& lse_, const Tensor& entropy_,
                                const Tensor& grad_lse_, const Tensor& grad_entropy_, double temperature) {
  const Device device(logits_);
  const Tensor logits = with_dense_rows(logits_);
  const auto vector = [](const Tensor& t) { return t.to(at::kFloat).contiguous(); };
  const Tensor lse = vector(lse_), entropy = vector(entropy_);
  const Tensor grad_lse = vector(grad_lse_), grad_entropy = vector(grad_entropy_);
  Tensor out = at::empty({logits.size(0), logits.size(1)}, logits.options());
  kernels::EntropyBackwardJob job;
  job.logits = rows_of(logits);
  job.temperature = as_temperature(temperature);
  job.lse = lse.data_ptr<float>();
  job.entropy = entropy.data_ptr<float>();
  job.grad_lse = grad_lse.data_ptr<float>();
  job.grad_entropy = grad_entropy.data_ptr<float>();
  job.out = out.data_ptr();
  check(kernels::launch_entropy_backward(job, device.stream()));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> draw(const Tensor& logits_, const Tensor& rng_, const Tensor& rows_,
                                        double temperature, int64_t top_k, double top_p, bool statistics) {
  const Device device(logits_);
  const Tensor logits = with_dense_rows(logits_), rng = rng_.contiguous(), rows = rows_.contiguous();
  kernels::DrawJob job;
  job.filter = filter_job(logits, temperature, top_k, top_p);
  job.rng = rng.data_ptr<int64_t>();
  job.rows = rows.data_ptr<int64_t>();
  Tensor tokens = longs(logits), out = floats(logits, {statistics ? kernels::STATISTICS : 0, logits.size(0)});
  Tensor argmax = statistics ? longs(logits) : at::empty({0}, tokens.options());
  job.tokens = tokens.data_ptr<int64_t>();
  if (statistics) {
    job.statistics = out.data_ptr<float>();
    job.argmax = argmax.data_ptr<int64_t>();
  }
  check(kernels::launch_draw(job, device.stream()));
  return {tokens, out, argmax};
}

Tensor unmask_confidence(const Tensor& logits_, const Tensor& tokens_, c10::string_view alg, double temperature,
                         int64_t top_k, double top_p) {
  const Device device(logits_);
  const Tensor logits = with_dense_rows(logits_), tokens = tokens_.contiguous();
  Tensor out = floats(logits, {logits.size(0)});
  kernels::ConfidenceJob job;
  job.filter = filter_job(logits, temperature, top_k, top_p);
  job.tokens = tokens.data_ptr<int64_t>();
  job.out = out.data_ptr<float>();
  if (alg == "entropy") {
    job.alg = kernels::Confidence::entropy;
  } else if (alg == "maskgit_plus") {
    job.alg = kernels::Confidence::maskgit_plus;
  } else if (alg == "topk_margin") {
    job.alg = kernels::Confidence::topk_margin;
  } else {
    TORCH_CHECK_VALUE(alg == "anchor", "entrgi_cuda: unknown alg '", alg, "'");
    job.alg = kernels::Confidence::anchor;
  }
  check(kernels::launch_confidence(job, device.stream()));
  return out;
}

}  // namespace

TORCH_LIBRARY(entrgi_cuda, m) {
  m.def("row_statistics(Tensor logits, float temperature, float temperature2, int bad_index) -> (Tensor, Tensor)");
  m.def(
      "softmax_entropy_backward(Tensor logits, Tensor lse, Tensor entropy, Tensor grad_lse, Tensor grad_entropy, "
      "float temperature) -> Tensor");
  m.def(
      "draw(Tensor logits, Tensor rng, Tensor keys, float temperature, int top_k, float top_p, bool statistics) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "unmask_confidence(Tensor logits, Tensor tokens, str alg, float temperature, int top_k, float top_p) -> Tensor");
}

TORCH_LIBRARY_IMPL(entrgi_cuda, ENTRGI_KEY, m) {
  m.impl("row_statistics", &row_statistics);
  m.impl("softmax_entropy_backward", &softmax_entropy_backward);
  m.impl("draw", &draw);
  m.impl("unmask_confidence", &unmask_confidence);
}
