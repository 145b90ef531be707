// The raw functions of csrc/cpu/ops.cpp under ThreadSanitizer (.ci/sanitize): every one on every instruction set of this
// machine, at shapes that are split among threads, with one thread and with four. A race ends the process with status 66;
// other bits with four threads than with one, with status 1.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/Parallel.h>

#include <cstdio>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"

using at::Tensor;
using Optional = std::optional<Tensor>;

template <class F>
auto operation(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow((std::string("entrgi_native::") + name).c_str(), "").typed<F>();
}

// All that one step computes, from logits [n, v] and a table [v, d].
std::vector<Tensor> everything(const Tensor& logits, const Tensor& table, double temperature, int64_t top_k, double top_p) {
  using Rows = std::tuple<Tensor, Tensor>;
  static const auto statistics = operation<Rows(const Tensor&, double)>("softmax_entropy");
  static const auto slope = operation<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                             double)>("softmax_entropy_backward");
  static const auto sample = operation<Tensor(const Tensor&, const Tensor&, const Tensor&, double, int64_t, double)>(
      "sample_tokens");
  static const auto confidence =
      operation<Tensor(const Tensor&, const Tensor&, c10::string_view, double, int64_t, double)>("unmask_confidence");
  static const auto pull = operation<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                            double)>("soft_embedding_backward");
  static const auto of_table =
      operation<Tensor(const Tensor&, const Tensor&, const Tensor&, double, at::ScalarType)>("soft_embedding_grad_table");
  static const auto blend = operation<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Optional&, const Optional&, c10::string_view,
      double, int64_t, double, const Tensor&, const Optional&)>("entrgi_embedding");
  static const auto update =
      operation<void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Optional&,
                     const Optional&, int64_t, double, double, double, double, double, bool)>("guidance_update_");

  const Tensor rng = at::arange(2, at::kLong), keys = at::arange(logits.size(0), at::kLong);
  const auto [lse, entropy] = statistics.call(logits, temperature);
  std::vector<Tensor> found{lse, entropy, slope.call(logits, lse, entropy, lse, entropy, temperature)};
  const Tensor tokens = sample.call(logits, rng, keys, temperature, top_k, top_p);
  for (const char* alg : {"entropy", "maskgit_plus", "topk_margin", "anchor"})
    found.push_back(confidence.call(logits, tokens, alg, temperature, top_k, top_p));
  const Tensor out = at::empty({logits.size(0), table.size(1)}, table.options());
  const auto [drawn, weight, unit, soft, sum, argmax] =
      blend.call(logits, table, rng, keys, {}, {}, "entropy", temperature, top_k, top_p, out, {});
  for (const Tensor& each : {tokens, out, drawn, weight, unit, soft, sum, argmax}) found.push_back(each);
  found.push_back(pull.call(logits, table, out, soft, sum, temperature));
  found.push_back(of_table.call(logits, out, sum, temperature, table.scalar_type()));
  const Tensor phi = logits.clone(), first = at::zeros_like(phi), second = at::zeros_like(phi);
  for (int64_t step = 1; step < 3; step++)
    update.call(phi, out, table, soft, sum, first, second, step, temperature, 0.5, 0.9, 0.999, 1e-8, true);
  for (const Tensor& each : {phi, first, second}) found.push_back(each);
  return found;
}

int main() {
  at::manual_seed(0);
  int count = 0, differing = 0, cases = 0;
  const char* const* isas = entrgi::supported_isas(&count);
  // Rows enough for several pieces; one row of a long vocabulary, whose parts have accumulators of their own; few rows;
  // columns for four groups.
  const int64_t shapes[][3] = {{70, 2500, 40}, {1, 9000, 300}, {5, 4100, 130}, {40, 33, 7}, {130, 600, 260}, {20, 1100, 512}};
  using Dtypes = std::pair<at::ScalarType, at::ScalarType>;  // of the logits and of the table
  const Dtypes dtypes[] = {{at::kFloat, at::kFloat},   {at::kBFloat16, at::kBFloat16}, {at::kHalf, at::kHalf},
                           {at::kDouble, at::kDouble}, {at::kFloat, at::kBFloat16}};
  for (int i = 0; i < count; i++) {
    entrgi::set_isa(isas[i]);
    for (const auto& [n, v, d] : shapes)
      for (const auto& [dtype, of_table] : dtypes) {
        const Tensor logits = at::randn({n, v}).mul_(4).to(dtype), table = at::randn({v, d}).to(of_table);
        for (const auto& [top_k, top_p] : {std::pair{int64_t{0}, 1.0}, {int64_t{0}, 0.9}, {int64_t{20}, 1.0}}) {
          at::threads_of_the_test = 1;
          const auto alone = everything(logits, table, 0.7, top_k, top_p);
          at::threads_of_the_test = 4;
          const auto together = everything(logits, table, 0.7, top_k, top_p);
          for (size_t part = 0; part < alone.size(); part++)
            if (!alone[part].equal(together[part])) {
              std::printf("%s, [%ld, %ld, %ld], %s and %s: result %zu depends on the number of threads\n", isas[i],
                          long(n), long(v), long(d), c10::toString(dtype), c10::toString(of_table), part);
              differing++;
            }
          cases++;
        }
      }
    std::printf("threads: %s done\n", isas[i]);
    std::fflush(stdout);
  }
  std::printf("threads: %d cases on %d instruction sets, %d results differ\n", cases, count, differing);
  return differing != 0;
}
