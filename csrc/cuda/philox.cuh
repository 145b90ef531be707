// Random words and exponential variates of docs/philox.md: the same bits on every backend.
#pragma once
#include "device.cuh"

namespace entrgi::cuda {

struct Words {
  uint32_t x[4];
};

DEVICE Words philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint64_t left = static_cast<uint64_t>(c0) * 0xD2511F53u, right = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(right >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(left >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(right);
    c3 = static_cast<uint32_t>(left);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Words{{c0, c1, c2, c3}};
}

// log of the exponential variate of a 64-bit word. logf and log1pf keep their relative accuracy near 1, where a race is
// decided; compiled without --use_fast_math.
DEVICE float log_exponential(uint32_t high, uint32_t low) {
  const bool upper = high >> 31;
  if (upper) {
    high = ~high;
    low = ~low;
  }
  const float u = static_cast<float>(high) * 0x1p-32f + (static_cast<float>(low) + 0.5f) * 0x1p-64f;
  return logf(upper ? -logf(u) : -log1pf(-u));
}

// The noise of one row. Neighbours of the vocabulary share a counter, whose words are kept between calls.
struct Noise {
  uint32_t seed_low, seed_high, step, row_low, row_high;
  uint32_t pair = 0xffffffffu;
  Words words;

  DEVICE Noise(const int64_t* rng, int64_t row)
      : seed_low(static_cast<uint32_t>(rng[0])),
        seed_high(static_cast<uint32_t>(static_cast<uint64_t>(rng[0]) >> 32)),
        step(static_cast<uint32_t>(rng[1])),
        row_low(static_cast<uint32_t>(row)),
        row_high(static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32)),
        words{} {}

  // log E of vocabulary entry `index`.
  DEVICE float operator()(int32_t index) {
    const uint32_t wanted = static_cast<uint32_t>(index) >> 1;
    if (wanted != pair) {
      pair = wanted;
      words = philox4x32(wanted, step, row_low, row_high, seed_low, seed_high);
    }
    const bool odd = index & 1;  // no indexing by it: the words stay in registers
    return log_exponential(odd ? words.x[2] : words.x[0], odd ? words.x[3] : words.x[1]);
  }
};

}  // namespace entrgi::cuda
