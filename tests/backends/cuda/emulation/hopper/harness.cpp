// What the tests call, by ctypes: a launcher under a seed's schedule. "" where it ran, else what broke.
#include "jobs.h"
#include "machine.h"

namespace hopper = entrgi::cuda::hopper;

namespace {

template <typename Launch>
const char* run(uint64_t seed, int mutant, Launch&& launch) {
  emulation::set_seed(seed);
  emulation::mutant = mutant;
  const cudaError_t error = launch();
  return error == cudaSuccess ? "" : error == cudaErrorLaunchFailure ? emulation::launch_error() : "the launch was refused";
}

}  // namespace

extern "C" {

const char* forward(const hopper::ForwardJob* job, int pairs, uint64_t seed, int mutant) {
  return run(seed, mutant, [&] {
    return pairs ? hopper::launch_forward_candidate(*job, nullptr) : hopper::launch_forward(*job, nullptr);
  });
}
// candidate: of candidates.cu; -1 for the tile that serves.
const char* update(const hopper::UpdateJob* job, int candidate, int multiprocessors, uint64_t seed, int mutant) {
  return run(seed, mutant, [&] {
    return candidate < 0 ? hopper::launch_update(*job, multiprocessors, nullptr)
                         : hopper::launch_update_candidate(candidate, *job, multiprocessors, nullptr);
  });
}
const char* candidate_name(size_t candidate) {
  static const std::vector<std::string> names = hopper::update_candidates();
  return candidate < names.size() ? names[candidate].c_str() : nullptr;
}
}
