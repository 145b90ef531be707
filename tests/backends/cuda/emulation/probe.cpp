// What tests ask of the device code beside the operators, by ctypes.
#include "philox.cuh"

using namespace entrgi::cuda;

namespace {

struct RaceJob {
  int* out;
};
// Reads what a neighbour writes, with nothing between: what it finds hangs on who runs first.
void racing_kernel(RaceJob job) {
  int* shared = &shared_memory<int>();
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  job.out[threadIdx.x] = shared[threadIdx.x ^ 1];
  __syncthreads();
}

}  // namespace

extern "C" {

// The order in which fibers, warps and blocks run from now on: 0 rising, 1 falling, else a shuffle's seed.
void set_order(unsigned order) { emulation::machine.order = order; }

void philox(const uint32_t* counter, const uint32_t* key, uint32_t* out) {
  const Words w = philox4x32(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
  for (int i = 0; i < 4; i++) out[i] = w.x[i];
}

float log_variate(int64_t seed, int64_t step, int64_t row, int32_t index) {
  const int64_t rng[2] = {seed, step};
  return Noise(rng, row)(index);
}

// Ordered key of a float32, as type f32 (0), bf16 (1) or f16 (2), and the least float32 that has the key.
uint32_t key_of(float x, int type) {
  return type == 0 ? ordered_key<float>(x) : type == 1 ? ordered_key<bf16>(x) : ordered_key<f16>(x);
}
float value_of(uint32_t key, int type) {
  return type == 0 ? key_value<float>(key) : type == 1 ? key_value<bf16>(key) : key_value<f16>(key);
}

void race(int* out) { launch(racing_kernel, 1, 64, 64 * sizeof(int), nullptr, RaceJob{out}); }
}
