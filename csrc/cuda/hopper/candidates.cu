// Tiles of the update that wait to be measured against the one that serves, by `python -m benchmarks.tools.tune --family hopper`.
// Built where ENTRGI_HOPPER_CANDIDATES is set (setup.py). Of moments they have two kinds: none, and bfloat16 read and written.
//
// Not here: 128 x 256, whose sums leave no room to be handed over but half by half, while products stand still; clusters of
// 2 x 2, which spare the cache what is not scarce, and leave multiprocessors of a GPC without a cluster.
#ifdef ENTRGI_HOPPER_CANDIDATES
#include "update.cuh"

namespace entrgi::cuda::hopper {
namespace {

struct Candidate {
  std::string name;
  cudaError_t (*run)(const UpdateJob&, int, cudaStream_t);
};

template <Tile T, int CLUSTER>
cudaError_t run(const UpdateJob& job, int multiprocessors, cudaStream_t stream) {
  if (job.logits.rows == 0) return cudaSuccess;
  if (job.reads != job.writes || job.wide_moments) return cudaErrorInvalidValue;
  return job.reads ? launch<T, CLUSTER, __nv_bfloat16, true, true>(job, multiprocessors, stream)
                   : launch<T, CLUSTER, __nv_bfloat16, false, false>(job, multiprocessors, stream);
}

// Blocks in pairs and alone.
template <Tile T>
void both(std::vector<Candidate>& all) {
  const auto text = [](int number) { return std::to_string(number); };
  std::string name = text(ROWS) + " x " + text(T.columns) + ", " + text(T.stages) + " stages of " + text(T.depth);
  if (T.prefetch) name += ", prefetched " + text(T.prefetch);
  name += ", " + text(T.finishers) + " finishing warps " + text(T.ahead) + " ahead";
  all.push_back({name + ", pairs", run<T, 2>});
  all.push_back({name + ", alone", run<T, 1>});
}

const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> found = [] {
    std::vector<Candidate> all;
    both<Tile{}>(all);  // the first is what serves
    both<Tile{.prefetch = 4, .multiplying = 128, .finishing = 128}>(all);
    both<Tile{.stages = 6, .depth = 32}>(all);
    both<Tile{.finishers = 4, .ahead = 6, .finishing = 200}>(all);
    both<Tile{.finishers = 4, .ahead = 12, .multiplying = 128, .finishing = 216}>(all);
    both<Tile{.columns = 128, .stages = 4, .finishers = 4, .ahead = 8, .multiplying = 104, .finishing = 240}>(all);
    both<Tile{.columns = 128, .stages = 5, .finishers = 4, .ahead = 8, .multiplying = 104, .finishing = 240}>(all);
    return all;
  }();
  return found;
}

}  // namespace

std::vector<std::string> update_candidates() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) names.push_back(candidate.name);
  return names;
}

cudaError_t launch_update_candidate(int64_t candidate, const UpdateJob& job, int multiprocessors, cudaStream_t stream) {
  if (candidate < 0 || candidate >= static_cast<int64_t>(candidates().size())) return cudaErrorInvalidValue;
  return candidates()[candidate].run(job, multiprocessors, stream);
}

}  // namespace entrgi::cuda::hopper
#endif
