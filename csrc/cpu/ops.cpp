// The raw functions of entrgi_kernels.backends.native, registered in namespace entrgi_native for CPU tensors.
// They allocate, choose a work split that depends on shapes alone (never on the number of threads, so that bits do not),
// and hand rows or units to the kernels of csrc/cpu.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "denormals.h"
#include "dispatch.h"

namespace {

using at::Tensor;
using entrgi::ceil_div;
using entrgi::Kernels;
using entrgi::Matrix;
using OptionalTensor = std::optional<Tensor>;

entrgi::Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble: return entrgi::Dtype::f64;
    case at::kFloat: return entrgi::Dtype::f32;
    case at::kBFloat16: return entrgi::Dtype::bf16;
    case at::kHalf: return entrgi::Dtype::f16;
    default: TORCH_CHECK_TYPE(false, "entrgi_native: unsupported dtype ", t.scalar_type());
  }
}

at::ScalarType acc_of(const Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// The tensor itself when its rows are contiguous (any distance between rows, zero included), else a copy.
Tensor with_plain_rows(const Tensor& t) { return t.dim() == 2 && t.size(1) > 1 && t.stride(1) != 1 ? t.contiguous() : t; }

Matrix matrix(const Tensor& t) {
  Matrix m;
  m.data = t.data_ptr();
  m.stride = t.stride(0);
  m.dtype = dtype_of(t);
  return m;
}

Tensor as_acc(const Tensor& t, at::ScalarType acc) { return t.to(acc).contiguous(); }
const int64_t* longs(const Tensor& t) { return t.data_ptr<int64_t>(); }

// `bytes` from the start of a cache line on; `owner` keeps them.
void* aligned_bytes(int64_t bytes, Tensor& owner) {
  owner = at::empty({bytes + 64}, at::kByte);
  return reinterpret_cast<void*>(entrgi::round_up(reinterpret_cast<int64_t>(owner.data_ptr()), 64));
}

// Runs unit(i, scratch) for every i in [0, count), each thread with its own scratch of `bytes`. Threads pull units one by
// one: a neighbour that takes a core away then costs one unit, not half the work.
template <typename F>
void run_units(int64_t count, int64_t bytes, const F& unit) {
  if (count == 0) return;
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), count));
  const int64_t each = entrgi::round_up(bytes, 4096);
  Tensor scratch;
  char* base = static_cast<char*>(aligned_bytes(threads * each, scratch));
  std::atomic<int64_t> next{0};
  auto work = [&](int64_t slot) {
    const entrgi::FlushDenormals flush;
    for (int64_t i; (i = next.fetch_add(1)) < count;) unit(i, static_cast<void*>(base + slot * each));
  };
  if (threads == 1) return work(0);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; slot++) work(slot);
  });
}

// rows(begin, end, scratch) over [0, n) in pieces of about 64k elements.
template <typename F>
void run_rows(int64_t n, int64_t v, int64_t bytes, const F& rows) {
  const int64_t piece = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, v));
  run_units(ceil_div(n, piece), bytes, [&](int64_t i, void* scratch) {
    rows(i * piece, std::min(n, (i + 1) * piece), scratch);
  });
}

struct Stats {
  Tensor maximum, total, lse, entropy, entropy_unit, argmax;
};
enum Want { MAXIMUM = 1, TOTAL = 2, LSE = 4, ENTROPY = 8, ENTROPY_UNIT = 16, ARGMAX = 32 };

Stats row_stats(const Tensor& logits, double temperature, int want) {
  entrgi::StatsJob job;
  job.logits = matrix(logits);
  job.n = logits.size(0);
  job.v = logits.size(1);
  job.temperature = temperature;
  Stats s;
  const auto options = logits.options().dtype(acc_of(logits));
  auto make = [&](int bit, Tensor& t, void*& pointer) {
    if (!(want & bit)) return;
    t = at::empty({job.n}, options);
    pointer = t.data_ptr();
  };
  make(MAXIMUM, s.maximum, job.maximum);
  make(TOTAL, s.total, job.total);
  make(LSE, s.lse, job.lse);
  make(ENTROPY, s.entropy, job.entropy);
  make(ENTROPY_UNIT, s.entropy_unit, job.entropy_unit);
  if (want & ARGMAX) {
    s.argmax = at::empty({job.n}, logits.options().dtype(at::kLong));
    job.argmax = s.argmax.data_ptr<int64_t>();
  }
  const Kernels& k = entrgi::kernels();
  run_rows(job.n, job.v, 0, [&](int64_t begin, int64_t end, void*) { k.stats(job, begin, end); });
  return s;
}

// What the gradients normalise by, from the log-sum-exp of these logits or of a wider matrix that they are columns of.
struct Normaliser {
  Tensor shift, rest;

  Normaliser(const Tensor& logits, const Tensor& lse, double temperature) {
    shift = at::zeros_like(lse);
    rest = lse;
    AT_DISPATCH_FLOATING_TYPES(lse.scalar_type(), "normaliser", [&] { split<scalar_t>(logits, temperature); });
  }
  entrgi::Normaliser pointers() const { return {shift.data_ptr(), rest.data_ptr()}; }

 private:
  template <typename A>
  static bool far(A lse) {  // its rounding shows in p, or it has overflowed; not where it is NaN
    return std::abs(lse) > 1024;
  }
  template <typename A>
  void split(const Tensor& logits, double temperature) {
    const int64_t n = rest.size(0);
    const A* lse = rest.data_ptr<A>();
    if (std::none_of(lse, lse + n, far<A>)) return;
    Tensor kept = rest, maximum = at::empty_like(rest), total = at::empty_like(rest), own = at::empty_like(rest);
    rest = rest.clone();
    entrgi::StatsJob job;
    job.logits = matrix(logits);
    job.n = n;
    job.v = logits.size(1);
    job.temperature = temperature;
    job.maximum = maximum.data_ptr();
    job.total = total.data_ptr();
    job.lse = own.data_ptr();
    A *shifts = shift.data_ptr<A>(), *rests = rest.data_ptr<A>();
    const A *tops = maximum.data_ptr<A>(), *totals = total.data_ptr<A>(), *owns = own.data_ptr<A>();
    const Kernels& k = entrgi::kernels();
    run_rows(n, job.v, 0, [&](int64_t begin, int64_t end, void*) {
      for (int64_t i = begin; i < end; i++) {
        if (!far(lse[i])) continue;
        k.stats(job, i, i + 1);
        if (std::isnan(tops[i])) continue;  // columns of -inf alone, of a wider matrix
        shifts[i] = tops[i];
        // A difference within rounding is none: the log-sum-exp is that of these logits.
        const double logsum = std::log(static_cast<double>(totals[i])), apart = static_cast<double>(lse[i]) - owns[i];
        const bool one = lse[i] == owns[i] || std::abs(apart) <= 4 * std::numeric_limits<A>::epsilon() * std::abs(owns[i]);
        rests[i] = static_cast<A>(one ? logsum : logsum + apart);
      }
    });
  }
};

entrgi::SampleJob sample_job(const Tensor& logits, const Stats& s, double temperature, int64_t top_k, double top_p) {
  entrgi::SampleJob job;
  job.logits = matrix(logits);
  job.n = logits.size(0);
  job.v = logits.size(1);
  job.temperature = temperature;
  job.top_k = top_k;
  job.top_p = top_p;
  job.maximum = s.maximum.data_ptr();
  job.total = s.total.data_ptr();
  return job;
}

Tensor draw(const Tensor& logits, const Stats& s, const Tensor& rng_, const Tensor& rows_, double temperature,
            int64_t top_k, double top_p) {
  const Tensor rng = rng_.contiguous(), rows = rows_.contiguous();
  Tensor tokens = at::empty({logits.size(0)}, logits.options().dtype(at::kLong));
  entrgi::SampleJob job = sample_job(logits, s, temperature, top_k, top_p);
  job.seed = static_cast<uint64_t>(longs(rng)[0]);
  job.step = static_cast<uint32_t>(longs(rng)[1]);
  job.rows = longs(rows);
  job.tokens = tokens.data_ptr<int64_t>();
  const Kernels& k = entrgi::kernels();
  run_rows(job.n, job.v, k.filter_scratch(job),
           [&](int64_t begin, int64_t end, void* scratch) { k.sample(job, begin, end, scratch); });
  return tokens;
}

// --- softmax_entropy --------------------------------------------------------------------------------------------------
std::tuple<Tensor, Tensor> softmax_entropy(const Tensor& logits_, double temperature) {
  const Tensor logits = with_plain_rows(logits_);
  Stats s = row_stats(logits, temperature, LSE | ENTROPY);
  return {s.lse, s.entropy};
}

Tensor softmax_entropy_backward(const Tensor& logits_, const Tensor& lse_, const Tensor& entropy_,
                                const Tensor& grad_lse_, const Tensor& grad_entropy_, double temperature) {
  const Tensor logits = with_plain_rows(logits_);
  const auto acc = acc_of(logits);
  const Tensor lse = as_acc(lse_, acc), entropy = as_acc(entropy_, acc);
  const Tensor grad_lse = as_acc(grad_lse_, acc), grad_entropy = as_acc(grad_entropy_, acc);
  Tensor out = at::empty({logits.size(0), logits.size(1)}, logits.options());
  entrgi::EntropyBackwardJob job;
  job.logits = matrix(logits);
  job.out = matrix(out);
  job.n = logits.size(0);
  job.v = logits.size(1);
  job.temperature = temperature;
  const Normaliser norm(logits, lse, temperature);
  job.norm = norm.pointers();
  job.entropy = entropy.data_ptr();
  job.grad_lse = grad_lse.data_ptr();
  job.grad_entropy = grad_entropy.data_ptr();
  const Kernels& k = entrgi::kernels();
  run_rows(job.n, job.v, 0, [&](int64_t begin, int64_t end, void*) { k.entropy_backward(job, begin, end); });
  return out;
}

// --- sample_tokens ----------------------------------------------------------------------------------------------------
Tensor sample_tokens(const Tensor& logits_, const Tensor& rng, const Tensor& rows, double temperature, int64_t top_k,
                     double top_p) {
  const Tensor logits = with_plain_rows(logits_);
  if (temperature == 0) {
    Stats s = row_stats(logits, 1.0, MAXIMUM | ARGMAX);
    return at::where(s.maximum.isnan(), at::full_like(s.argmax, -1), s.argmax);
  }
  Stats s = row_stats(logits, temperature, MAXIMUM | TOTAL);
  return draw(logits, s, rng, rows, temperature, top_k, top_p);
}

// --- soft embeddings --------------------------------------------------------------------------------------------------
// How many parts of V get an accumulator of their own. More parts use more threads and more memory: up to 3% of the
// logits' own bytes, or half a megabyte.
int64_t choose_splits(const entrgi::ForwardJob& job, int64_t accumulator_bytes) {
  const double logits_bytes = static_cast<double>(job.n) * job.v * entrgi::size_of(job.logits.dtype);
  const double budget = std::max(512.0 * 1024, 0.03 * logits_bytes);
  int64_t splits = 1;
  while (splits < 16 && 2 * splits * accumulator_bytes <= budget && job.v >= 2048 * splits) splits *= 2;
  return splits;
}

// Where the blend with the hard tokens goes, and what it is made of.
struct Blend {
  const Tensor &tokens, &weight, &out;
  const int64_t* places;
};

// The soft embedding [n, d] in acc; writes the blend where one is wanted.
Tensor forward(const Tensor& logits, const Tensor& embedding, const Stats& s, double temperature,
               const Blend* blend = nullptr) {
  entrgi::ForwardJob job;
  job.logits = matrix(logits);
  job.embedding = matrix(embedding);
  job.n = logits.size(0);
  job.v = logits.size(1);
  job.d = embedding.size(1);
  job.temperature = temperature;
  job.maximum = s.maximum.data_ptr();
  job.total = s.total.data_ptr();
  const auto acc = acc_of(logits);
  Tensor soft = at::empty({job.n, job.d}, logits.options().dtype(acc));
  job.soft = soft.data_ptr();
  if (blend) {
    job.mixed = matrix(blend->out);
    job.places = blend->places;
    job.tokens = longs(blend->tokens);
    job.weight = blend->weight.data_ptr();
  }
  if (job.n == 0 || job.d == 0) return soft;
  const Kernels& k = entrgi::kernels();
  int64_t rows = 0, columns = 0;
  k.forward_padding(job, &rows, &columns);
  job.splits = choose_splits(job, rows * columns * static_cast<int64_t>(soft.element_size()));
  // Columns are independent of each other: their groups may follow the number of threads.
  job.groups = std::max<int64_t>(1, std::min(ceil_div(at::get_num_threads(), job.splits), job.d / 128));
  Tensor accumulators = at::empty({job.splits * rows * columns}, soft.options());
  job.accumulators = accumulators.data_ptr();
  run_units(job.splits * job.groups, k.forward_scratch(job),
            [&](int64_t unit, void* scratch) { k.forward_unit(job, unit, scratch); });
  run_rows(job.n, job.d, 0, [&](int64_t begin, int64_t end, void*) { k.forward_combine(job, begin, end); });
  return soft;
}

// Logits in float64 when the table is: the kernels accumulate in the logits' precision.
Tensor prepared_logits(const Tensor& logits, const Tensor& embedding) {
  return with_plain_rows(embedding.scalar_type() == at::kDouble ? logits.to(at::kDouble) : logits);
}

std::tuple<Tensor, Tensor> soft_embedding(const Tensor& logits_, const Tensor& embedding_, double temperature) {
  const Tensor logits = prepared_logits(logits_, embedding_), embedding = with_plain_rows(embedding_);
  Stats s = row_stats(logits, temperature, MAXIMUM | TOTAL | LSE);
  return {forward(logits, embedding, s, temperature), s.lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> entrgi_embedding(
    const Tensor& logits_, const Tensor& embedding_, const Tensor& rng, const Tensor& rows,
    const OptionalTensor& tokens_, const OptionalTensor& weight_, c10::string_view mode, double temperature,
    int64_t top_k, double top_p, const Tensor& out, const OptionalTensor& index_) {
  const Tensor logits = prepared_logits(logits_, embedding_), embedding = with_plain_rows(embedding_);
  const int64_t n = logits.size(0), v = logits.size(1);
  const auto acc = acc_of(logits);
  Stats s = row_stats(logits, temperature, MAXIMUM | TOTAL | LSE | ENTROPY_UNIT | ARGMAX);
  Tensor weight;
  if (mode == "entropy") {
    weight = v > 1 ? s.entropy_unit / std::log(static_cast<double>(v)) : s.entropy_unit.clone();
  } else if (mode == "given") {
    TORCH_CHECK_VALUE(weight_.has_value(), "weight_mode 'given' needs a weight");
    weight = weight_->to(acc, /*non_blocking=*/false, /*copy=*/true).contiguous();
  } else {
    TORCH_CHECK_VALUE(mode == "one" || mode == "zero", "unknown weight_mode '", mode, "'");
    weight = at::full({n}, mode == "one" ? 1.0 : 0.0, logits.options().dtype(acc));
  }
  Tensor tokens;
  if (tokens_.has_value()) {
    tokens = tokens_->clone(at::MemoryFormat::Contiguous);
    for (int64_t i = 0; i < n; i++) TORCH_CHECK_INDEX(longs(tokens)[i] < v, "token ", longs(tokens)[i], " of ", v);
  } else if (mode == "zero") {
    tokens = at::full({n}, -1, logits.options().dtype(at::kLong));
  } else {
    tokens = draw(logits, s, rng, rows, temperature, top_k, top_p);
  }
  Tensor index;  // kept for as long as its entries are read
  if (index_.has_value()) {
    index = index_->contiguous();
    for (int64_t i = 0; i < n; i++)
      TORCH_CHECK_INDEX(longs(index)[i] >= 0 && longs(index)[i] < out.size(0), "index ", longs(index)[i],
                        ": expected a row of out, which has ", out.size(0));
  }
  const Blend blend{tokens, weight, out, index_.has_value() ? longs(index) : nullptr};
  const Tensor soft = forward(logits, embedding, s, temperature, &blend);
  return {tokens, weight, s.entropy_unit, soft, s.lse, s.argmax};
}

// --- backward of the logits -------------------------------------------------------------------------------------------
// Sum of a * b over each row, in an order of its own: torch's sum may split a long row by the number of threads.
Tensor row_dot(const Tensor& a, const Tensor& b) {
  Tensor out = at::empty({a.size(0)}, a.options());
  const int64_t width = a.size(1);
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "row_dot", [&] {
    const scalar_t *x = a.data_ptr<scalar_t>(), *y = b.data_ptr<scalar_t>();
    scalar_t* to = out.data_ptr<scalar_t>();
    run_rows(a.size(0), width, 0, [&](int64_t begin, int64_t end, void*) {
      for (int64_t n = begin; n < end; n++) {
        double sums[4] = {0, 0, 0, 0};
        for (int64_t d = 0; d < width; d++) sums[d & 3] += static_cast<double>(x[n * width + d]) * y[n * width + d];
        to[n] = static_cast<scalar_t>((sums[0] + sums[1]) + (sums[2] + sums[3]));
      }
    });
  });
  return out;
}

// Everything of the job but the destination, and the tensors that it points to. `against` [N, D]: the baseline is its dot
// product with the gradient.
struct Backward {
  entrgi::BackwardJob job;
  Tensor embedding, grad, baseline, packed;
  std::optional<Normaliser> norm;

  Backward(const Tensor& logits, const Tensor& embedding_, const Tensor& grad_, const Tensor& against) {
    const auto acc = acc_of(logits);
    embedding = with_plain_rows(embedding_);
    grad = with_plain_rows(grad_);
    baseline = row_dot(as_acc(grad_, acc), as_acc(against, acc));
    job.logits = matrix(logits);
    job.embedding = matrix(embedding);
    job.grad = matrix(grad);
    job.n = logits.size(0);
    job.v = logits.size(1);
    job.d = embedding.size(1);
    job.baseline = baseline.data_ptr();
  }
  Backward(const Tensor& logits, const Tensor& embedding, const Tensor& grad, const Tensor& soft, const Tensor& lse,
           double temperature)
      : Backward(logits, embedding, grad, soft) {
    job.temperature = temperature;
    job.norm = norm.emplace(logits, as_acc(lse, acc_of(logits)), temperature).pointers();
  }
  void run() {
    if (job.n == 0) return;
    const Kernels& k = entrgi::kernels();
    job.packed = aligned_bytes(k.gradient_pack_size(job), packed);
    k.pack_gradient(job);
    run_units(k.backward_units(job), k.backward_scratch(job),
              [&](int64_t unit, void* scratch) { k.backward_unit(job, unit, scratch); });
  }
};

Tensor soft_embedding_backward(const Tensor& logits_, const Tensor& embedding, const Tensor& grad, const Tensor& soft,
                               const Tensor& lse, double temperature) {
  const Tensor logits = prepared_logits(logits_, embedding);
  Tensor out = at::empty({logits.size(0), logits.size(1)}, logits.options());
  Backward backward(logits, embedding, grad, soft, lse, temperature);
  backward.job.out = matrix(out);
  backward.run();
  return out.to(logits_.scalar_type());
}

// A tensor that the epilogue can update in place: `t` itself, or a copy in `dtype` that copy_back returns to it.
Tensor updatable(const Tensor& t, at::ScalarType dtype) {
  return t.scalar_type() == dtype && (t.size(1) <= 1 || t.stride(1) == 1) ? t : t.to(dtype).contiguous();
}
void copy_back(const Tensor& t, const Tensor& updated) {
  if (!t.is_same(updated)) t.copy_(updated);
}

void guidance_update_(const Tensor& logits_, const Tensor& grad, const Tensor& embedding, const Tensor& soft,
                      const Tensor& lse, const OptionalTensor& exp_avg_, const OptionalTensor& exp_avg_sq_,
                      int64_t step, double temperature, double lr, double beta1, double beta2, double eps,
                      bool keep) {
  const auto phi_dtype = embedding.scalar_type() == at::kDouble ? at::kDouble : logits_.scalar_type();
  const Tensor logits = updatable(logits_, phi_dtype);
  const auto acc = acc_of(logits);
  Backward backward(logits, embedding, grad, soft, lse, temperature);
  Tensor exp_avg, exp_avg_sq;
  const bool state = exp_avg_.has_value() && exp_avg_sq_.has_value();
  entrgi::Adam& adam = backward.job.adam;
  adam.reads = state && step > 1;
  adam.writes = state && keep;
  if (adam.reads || adam.writes) {
    // Moments are in phi's dtype or in acc; anything else goes through a copy in acc.
    const bool same = exp_avg_->scalar_type() == phi_dtype && exp_avg_sq_->scalar_type() == phi_dtype;
    exp_avg = updatable(*exp_avg_, same ? phi_dtype : acc);
    exp_avg_sq = updatable(*exp_avg_sq_, same ? phi_dtype : acc);
    backward.job.exp_avg = matrix(exp_avg);
    backward.job.exp_avg_sq = matrix(exp_avg_sq);
  }
  adam.step_size = lr / (1 - std::pow(beta1, static_cast<double>(step)));
  adam.sqrt_correction2 = std::sqrt(1 - std::pow(beta2, static_cast<double>(step)));
  adam.beta1 = beta1;
  adam.beta2 = beta2;
  adam.eps = eps;
  backward.run();
  copy_back(logits_, logits);
  if (adam.writes) {
    copy_back(*exp_avg_, exp_avg);
    copy_back(*exp_avg_sq_, exp_avg_sq);
  }
}

void first_order_update_(const Tensor& logits_, const Tensor& grad, const Tensor& embedding, const Tensor& tokens,
                         double scale) {
  const Tensor logits =
      updatable(logits_, embedding.scalar_type() == at::kDouble ? at::kDouble : logits_.scalar_type());
  const int64_t v = embedding.size(0);
  Backward backward(logits, embedding, grad, embedding.index_select(0, tokens.clamp(0, v - 1)));
  // What is no token leaves no number: the row becomes NaN.
  backward.baseline.masked_fill_(tokens.lt(0).logical_or_(tokens.ge(v)), std::numeric_limits<double>::quiet_NaN());
  backward.job.linear = true;
  backward.job.scale = scale;
  backward.run();
  copy_back(logits_, logits);
}

Tensor soft_embedding_grad_table(const Tensor& logits_, const Tensor& grad_, const Tensor& lse_, double temperature,
                                 at::ScalarType dtype) {
  const bool wide = lse_.scalar_type() == at::kDouble;
  const Tensor logits = with_plain_rows(wide ? logits_.to(at::kDouble) : logits_), grad = with_plain_rows(grad_);
  const Normaliser norm(logits, as_acc(lse_, acc_of(logits)), temperature);
  entrgi::TableJob job;
  Tensor out = at::empty({logits.size(1), grad.size(1)}, logits.options().dtype(dtype));
  job.logits = matrix(logits);
  job.grad = matrix(grad);
  job.out = matrix(out);
  job.n = logits.size(0);
  job.v = logits.size(1);
  job.d = grad.size(1);
  job.temperature = temperature;
  job.norm = norm.pointers();
  if (job.d == 0) return out;
  const Kernels& k = entrgi::kernels();
  Tensor packed;
  job.packed = aligned_bytes(k.table_pack_size(job), packed);
  k.pack_table(job);
  run_units(k.table_units(job), k.table_scratch(job),
            [&](int64_t unit, void* scratch) { k.table_unit(job, unit, scratch); });
  return out;
}

// --- unmask_confidence ------------------------------------------------------------------------------------------------
Tensor unmask_confidence(const Tensor& logits_, const Tensor& tokens_, c10::string_view alg, double temperature,
                         int64_t top_k, double top_p) {
  const Tensor logits = with_plain_rows(logits_), tokens = tokens_.contiguous();
  const bool anchor = alg == "anchor";
  Stats s = row_stats(logits, temperature, anchor ? MAXIMUM : MAXIMUM | TOTAL);
  if (anchor) s.total = s.maximum;
  Tensor out = at::empty({logits.size(0)}, logits.options().dtype(acc_of(logits)));
  entrgi::ConfidenceJob job;
  job.filter = sample_job(logits, s, temperature, top_k, top_p);
  job.filter.tokens = tokens.data_ptr<int64_t>();
  if (anchor) {
    job.alg = entrgi::Confidence::anchor;
  } else if (alg == "entropy") {
    job.alg = entrgi::Confidence::entropy;
  } else if (alg == "maskgit_plus") {
    job.alg = entrgi::Confidence::maskgit_plus;
  } else {
    TORCH_CHECK_VALUE(alg == "topk_margin", "unknown alg '", alg, "'");
    job.alg = entrgi::Confidence::topk_margin;
  }
  job.out = out.data_ptr();
  const Kernels& k = entrgi::kernels();
  run_rows(job.filter.n, job.filter.v, k.filter_scratch(job.filter),
           [&](int64_t begin, int64_t end, void* scratch) { k.confidence(job, begin, end, scratch); });
  return out;
}

}  // namespace

TORCH_LIBRARY(entrgi_native, m) {
  m.def("softmax_entropy(Tensor logits, float temperature) -> (Tensor, Tensor)");
  m.def(
      "softmax_entropy_backward(Tensor logits, Tensor lse, Tensor entropy, Tensor grad_lse, Tensor grad_entropy, "
      "float temperature) -> Tensor");
  m.def(
      "sample_tokens(Tensor logits, Tensor rng, Tensor keys, float temperature, int top_k, float top_p) -> Tensor");
  m.def("soft_embedding(Tensor logits, Tensor table, float temperature) -> (Tensor, Tensor)");
  m.def(
      "soft_embedding_backward(Tensor logits, Tensor table, Tensor grad, Tensor soft, Tensor lse, "
      "float temperature) -> Tensor");
  m.def(
      "soft_embedding_grad_table(Tensor logits, Tensor grad, Tensor lse, float temperature, ScalarType dtype) -> "
      "Tensor");
  m.def(
      "entrgi_embedding(Tensor logits, Tensor table, Tensor rng, Tensor keys, Tensor? tokens, Tensor? weight, "
      "str weight_mode, float temperature, int top_k, float top_p, Tensor(a!) out, Tensor? index) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "guidance_update_(Tensor(a!) logits, Tensor grad, Tensor table, Tensor soft, Tensor lse, "
      "Tensor(b!)? exp_avg, Tensor(c!)? exp_avg_sq, int step, float temperature, float lr, float beta1, float beta2, "
      "float eps, bool keep) -> ()");
  m.def(
      "first_order_update_(Tensor(a!) logits, Tensor grad, Tensor embedding, Tensor tokens, float scale) -> ()");
  m.def(
      "unmask_confidence(Tensor logits, Tensor tokens, str alg, float temperature, int top_k, float top_p) -> Tensor");
}

TORCH_LIBRARY_IMPL(entrgi_native, CPU, m) {
  m.impl("softmax_entropy", &softmax_entropy);
  m.impl("softmax_entropy_backward", &softmax_entropy_backward);
  m.impl("sample_tokens", &sample_tokens);
  m.impl("soft_embedding", &soft_embedding);
  m.impl("soft_embedding_backward", &soft_embedding_backward);
  m.impl("soft_embedding_grad_table", &soft_embedding_grad_table);
  m.impl("entrgi_embedding", &entrgi_embedding);
  m.impl("guidance_update_", &guidance_update_);
  m.impl("first_order_update_", &first_order_update_);
  m.impl("unmask_confidence", &unmask_confidence);
}
