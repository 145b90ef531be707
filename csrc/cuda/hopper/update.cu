// The update with the tile that serves, for every kind of moments.
#include "update.cuh"

namespace entrgi::cuda::hopper {
namespace {

template <int CLUSTER, typename M>
cudaError_t of_moments(const UpdateJob& job, int multiprocessors, cudaStream_t stream) {
  if (job.reads && job.writes) return launch<Tile, CLUSTER, M, true, true>(job, multiprocessors, stream);
  if (job.reads) return launch<Tile, CLUSTER, M, true, false>(job, multiprocessors, stream);
  if (job.writes) return launch<Tile, CLUSTER, M, false, true>(job, multiprocessors, stream);
  return launch<Tile, CLUSTER, __nv_bfloat16, false, false>(job, multiprocessors, stream);
}

}  // namespace

cudaError_t launch_update(const UpdateJob& job, int multiprocessors, cudaStream_t stream) {
  if (job.logits.rows == 0) return cudaSuccess;
  if (job.logits.rows > ROWS) {
    return job.wide_moments ? of_moments<2, float>(job, multiprocessors, stream)
                            : of_moments<2, __nv_bfloat16>(job, multiprocessors, stream);
  }
  return job.wide_moments ? of_moments<1, float>(job, multiprocessors, stream)
                          : of_moments<1, __nv_bfloat16>(job, multiprocessors, stream);
}

}  // namespace entrgi::cuda::hopper
