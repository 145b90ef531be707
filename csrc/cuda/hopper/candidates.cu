// Tiles of the update that wait to be measured against `Present`; built where ENTRGI_HOPPER_CANDIDATES is set (setup.py), for
// `python -m benchmarks.tools.tune --family update`. Of moments they have two kinds: none, and bfloat16 read and written.
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

template <typename T, int CLUSTER>
cudaError_t run(const UpdateJob& job, int multiprocessors, cudaStream_t stream) {
  if (job.logits.rows == 0) return cudaSuccess;
  if (job.reads != job.writes || job.wide_moments) return cudaErrorInvalidValue;
  return job.reads ? launch<T, CLUSTER, __nv_bfloat16, true, true>(job, multiprocessors, stream)
                   : launch<T, CLUSTER, __nv_bfloat16, false, false>(job, multiprocessors, stream);
}

template <typename T, int CLUSTER>
Candidate candidate() {
  const std::string sizes = std::to_string(ROWS) + " x " + std::to_string(T::COLUMNS) + ", " + std::to_string(T::STAGES);
  const std::string warps = std::to_string(T::FINISHERS) + " finishing warps " + std::to_string(T::AHEAD) + " ahead";
  return {sizes + " stages, " + warps + (CLUSTER == 1 ? ", alone" : ", pairs"), run<T, CLUSTER>};
}

// The first is `Present`.
const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> all = {
      candidate<Tile<192, 3, 6, 4, 136, 120>, 2>(),  candidate<Tile<192, 3, 6, 4, 136, 120>, 1>(),
      candidate<Tile<192, 3, 4, 6, 136, 200>, 2>(),  candidate<Tile<192, 3, 4, 6, 136, 200>, 1>(),
      candidate<Tile<192, 3, 4, 12, 128, 216>, 1>(), candidate<Tile<128, 4, 4, 8, 104, 240>, 2>(),
      candidate<Tile<128, 4, 4, 8, 104, 240>, 1>(),  candidate<Tile<128, 5, 4, 8, 104, 240>, 1>(),
  };
  return all;
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
