// Tiles of the update that wait to be measured against the one that serves, by `python -m benchmarks.tools.tune --family hopper`.
// Built where ENTRGI_HOPPER_CANDIDATES is set (setup.py). Of moments they have two kinds: none, and bfloat16 read and written.
//
// Not here: 128 x 256, whose sums leave no room to be handed over but half by half, while products stand still; clusters of
// 2 x 2, which spare the cache what is not scarce, and leave multiprocessors of a GPC without a cluster.
#ifdef ENTRGI_HOPPER_CANDIDATES
#include "update.cuh"

namespace entrgi::cuda::hopper {
namespace {

struct Told : Tile {
  static constexpr bool TOLD = true;
};
struct Prefetched : Tile {
  static constexpr int PREFETCH = 4, MULTIPLYING = 128, FINISHING = 128;
};
struct ShortSteps : Tile {
  static constexpr int STAGES = 6, DEPTH = 32;
};
// Four warps with no fewer loads in flight than six.
struct Four : Tile {
  static constexpr int FINISHERS = 4, AHEAD = 6, FINISHING = 200;
};
struct FourFarAhead : Tile {
  static constexpr int FINISHERS = 4, AHEAD = 12, MULTIPLYING = 128, FINISHING = 216;
};
struct Narrow : Tile {
  static constexpr int COLUMNS = 128, STAGES = 4, FINISHERS = 4, AHEAD = 8, MULTIPLYING = 104, FINISHING = 240;
};
struct NarrowDeep : Narrow {
  static constexpr int STAGES = 5;
};
struct FourTold : Four {
  static constexpr bool TOLD = true;
};
struct NarrowTold : Narrow {
  static constexpr bool TOLD = true;
};

struct Candidate {
  std::string name;
  cudaError_t (*run)(const UpdateJob&, int, cudaStream_t);
};

template <typename T, int CLUSTER>
cudaError_t run(const UpdateJob& job, int multiprocessors, cudaStream_t stream) {
  if (job.logits.rows == 0) return cudaSuccess;
  if (job.reads != job.writes || job.wide_moments) return cudaErrorInvalidValue;
  return job.reads ? launch<T, CLUSTER, __nv_bfloat16, true, true>(job, multiprocessors, stream)
                   : launch<T, CLUSTER, __nv_bfloat16, false, false>(job, multiprocessors, stream);
}

// Blocks in pairs and alone.
template <typename T>
void both(std::vector<Candidate>& all) {
  const auto text = [](int number) { return std::to_string(number); };
  std::string name = text(ROWS) + " x " + text(T::COLUMNS) + ", " + text(T::STAGES) + " stages of " + text(T::DEPTH);
  if (T::PREFETCH) name += ", prefetched " + text(T::PREFETCH);
  if (T::TOLD) name += ", told";
  name += ", " + text(T::FINISHERS) + " finishing warps " + text(T::AHEAD) + " ahead";
  all.push_back({name + ", pairs", run<T, 2>});
  all.push_back({name + ", alone", run<T, 1>});
}

const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> found = [] {
    std::vector<Candidate> all;
    both<Tile>(all);  // the first is what serves
    both<Told>(all);
    both<Prefetched>(all);
    both<ShortSteps>(all);
    both<Four>(all);
    both<FourTold>(all);
    both<FourFarAhead>(all);
    both<Narrow>(all);
    both<NarrowTold>(all);
    both<NarrowDeep>(all);
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
