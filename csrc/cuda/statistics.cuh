// Row statistics in one read: maximum, log-sum-exp and entropy at one temperature, log-sum-exp at a second, argmax.
//
// Each thread keeps a running maximum m and, with d = x - m, the sums of exp(d / temperature), of that times d, and of
// exp(d / temperature2); a raised maximum rescales them. Threads, warps and blocks are merged in a fixed order. A NaN or
// +inf makes a sum NaN, and through it every statistic of the row.
#pragma once
#include "device.cuh"

namespace entrgi::cuda {

// A running state of part of a row. `place` is the lowest index of the maximum.
struct Moments {
  float m = -INFINITY, s = 0, t = 0, s2 = 0;
  int32_t place = INT32_MAX;
};

struct Scales {  // of exponents, to base 2
  float c, c2;
  DEVICE Scales(float temperature, float temperature2)
      : c(LOG2E / temperature), c2(temperature2 > 0 ? LOG2E / temperature2 : 0) {}
};

// How far down a raised maximum moves what was summed below it. Of rows masked with the least finite number that overflows
// float; times a factor of zero it would be NaN.
DEVICE float moved(float from, float to) { return fmaxf(from - to, -1e30f); }

DEVICE Moments merge(const Moments& a, const Moments& b, const Scales& k) {
  Moments r;
  r.m = fmaxf(a.m, b.m);
  // A part without a finite entry has sums of zero (or NaN, which has to stay): any finite factor will do.
  const float da = a.m == -INFINITY ? 0.0f : moved(a.m, r.m), db = b.m == -INFINITY ? 0.0f : moved(b.m, r.m);
  const float fa = exp2_fast(da * k.c), fb = exp2_fast(db * k.c);
  r.s = a.s * fa + b.s * fb;
  r.t = (a.t + (a.s > 0 ? a.s * da : 0.0f)) * fa + (b.t + (b.s > 0 ? b.s * db : 0.0f)) * fb;
  r.s2 = a.s2 * exp2_fast(da * k.c2) + b.s2 * exp2_fast(db * k.c2);
  r.place = a.m > b.m ? a.place : b.m > a.m ? b.place : a.place < b.place ? a.place : b.place;
  return r;
}

// One thread's share of row[begin, end). MOMENT: the sum for the entropy. SECOND: that at the second temperature.
template <typename T, int THREADS, bool MOMENT, bool SECOND>
DEVICE Moments thread_moments(const T* row, int32_t begin, int32_t end, const Scales& k) {
  constexpr int W = WIDE<T>;
  Moments r;
  float reference = 0;  // the maximum, or 0 while there is no finite entry: d is then -inf and every term 0
  walk<T, THREADS, 4>(row, begin, end, [&](const float(&x)[W], int32_t index) {
    float top = x[0];
#pragma unroll
    for (int i = 1; i < W; i++) top = fmaxf(top, x[i]);
    if (top >= r.m && top > -INFINITY) {
      int32_t place = index;
#pragma unroll
      for (int i = W - 1; i >= 0; i--) place = x[i] == top ? index + i : place;
      if (top > r.m) {
        const float d = r.m == -INFINITY ? 0.0f : moved(r.m, top), f = exp2_fast(d * k.c);
        if (MOMENT) r.t = (r.t + (r.s > 0 ? r.s * d : 0.0f)) * f;
        r.s *= f;
        if (SECOND) r.s2 *= exp2_fast(d * k.c2);
        r.m = reference = top;
        r.place = place;
      } else {
        r.place = place < r.place ? place : r.place;
      }
    }
#pragma unroll
    for (int i = 0; i < W; i++) {
      const float d = x[i] - reference, e = exp2_fast(d * k.c);
      r.s += e;
      if (MOMENT) r.t += e * fmaxf(d, -1e30f);  // 0 * -inf would be NaN
      if (SECOND) r.s2 += exp2_fast(d * k.c2);
    }
  });
  return r;
}

// The statistics of a whole row. `bad` says that they mean nothing.
struct RowStatistics {
  float maximum, lse, entropy, logsum, lse2, logsum2;
  int32_t argmax;
  bool bad;
};

DEVICE RowStatistics finish(const Moments& r, float temperature, float temperature2) {
  RowStatistics s;
  s.bad = !(r.m > -INFINITY && r.m < INFINITY) || !(r.s > 0);
  const float nan = bits_float(0x7fc00000u);
  s.maximum = s.bad ? nan : r.m;
  s.logsum = logf(r.s);
  s.lse = s.maximum / temperature + s.logsum;
  s.entropy = s.bad ? nan : fmaxf(s.logsum - r.t / r.s / temperature, 0.0f);
  s.logsum2 = logf(r.s2);
  s.lse2 = s.maximum / temperature2 + s.logsum2;
  s.logsum = s.bad ? nan : s.logsum;
  s.logsum2 = s.bad ? nan : s.logsum2;
  s.argmax = r.place;
  return s;
}

// By one thread of the row: what the statistics' arrays hold.
DEVICE void write(const RowStatistics& s, float* out, int64_t n, int64_t row, bool second) {
  out[MAXIMUM * n + row] = s.maximum;
  out[LSE * n + row] = s.lse;
  out[ENTROPY * n + row] = s.entropy;
  out[LOGSUM * n + row] = s.logsum;
  if (second) {
    out[LSE2 * n + row] = s.lse2;
    out[LOGSUM2 * n + row] = s.logsum2;
  }
}

template <typename T, int THREADS, bool MOMENT, bool SECOND>
DEVICE Moments block_moments(const T* row, int32_t begin, int32_t end, const Scales& k, Moments* slots) {
  const Moments mine = thread_moments<T, THREADS, MOMENT, SECOND>(row, begin, end, k);
  return block_merge<THREADS>(mine, slots, [&](const Moments& a, const Moments& b) { return merge(a, b, k); });
}

template <int THREADS>
struct StatisticsShared {
  Moments slots[THREADS / LANES];
  int32_t last;
};

// Parts of split rows come first in the workspace, the counters of those that have arrived after them.
DEVICE Moments* parts_of(const StatisticsJob& job) { return static_cast<Moments*>(job.workspace); }

// A block takes a slice of a row. Where several share a row, the last to arrive merges their parts, in order.
template <typename T, int THREADS, int BLOCKS, bool SECOND>
__global__ void __launch_bounds__(THREADS, BLOCKS) statistics_kernel(StatisticsJob job) {
  auto& shared = shared_memory<StatisticsShared<THREADS>>();
  const int32_t v = job.logits.v, splits = job.splits;
  const int64_t row = blockIdx.x / splits;
  const int32_t split = static_cast<int32_t>(blockIdx.x % splits);
  constexpr int32_t GRAIN = THREADS * WIDE<T>;  // slices start where wide loads of an aligned row do
  const int32_t length = ((v - 1) / splits / GRAIN + 1) * GRAIN;
  const int64_t start = static_cast<int64_t>(split) * length, stop = start + length;
  const int32_t begin = start < v ? static_cast<int32_t>(start) : v, end = stop < v ? static_cast<int32_t>(stop) : v;
  const Scales k(job.temperature, job.temperature2);
  Moments whole =
      block_moments<T, THREADS, true, SECOND>(row_of<T>(job.logits, row), begin, end, k, shared.slots);
  if (splits > 1) {
    Moments* parts = parts_of(job) + row * splits;
    unsigned* arrived = reinterpret_cast<unsigned*>(parts_of(job) + job.logits.n * splits) + row;
    if (threadIdx.x == 0) {
      parts[split] = whole;
      __threadfence();  // the part is seen before the arrival is
      shared.last = atomicAdd(arrived, 1u) == static_cast<unsigned>(splits - 1);
    }
    __syncthreads();
    if (!shared.last) return;
    __threadfence();
    if (threadIdx.x != 0) return;
    const volatile Moments* all = parts;
    for (int32_t i = 0; i < splits; i++) {
      Moments part;
      part.m = all[i].m, part.s = all[i].s, part.t = all[i].t, part.s2 = all[i].s2, part.place = all[i].place;
      whole = i == 0 ? part : merge(whole, part, k);
    }
  }
  if (threadIdx.x == 0) {
    const RowStatistics s = finish(whole, job.temperature, SECOND ? job.temperature2 : 1.0f);
    write(s, job.out, job.logits.n, row, SECOND);
    if (job.argmax) job.argmax[row] = s.bad ? job.bad_index : s.argmax;
  }
}

// d lse / d x = p / temperature, d H / d x = -p (log p + H) / temperature; a block takes a slice of a row.
template <typename T, int THREADS, int BLOCKS, int SLICE>
__global__ void __launch_bounds__(THREADS, BLOCKS) entropy_backward_kernel(EntropyBackwardJob job) {
  constexpr int W = WIDE<T>;
  const int32_t v = job.logits.v, slices = (v - 1) / SLICE + 1;
  const int64_t row = blockIdx.x / slices;
  const int32_t begin = static_cast<int32_t>(blockIdx.x % slices) * SLICE;
  const int32_t end = v - begin > SLICE ? begin + SLICE : v;
  const T* x = row_of<T>(job.logits, row);
  T* out = static_cast<T*>(job.out) + row * v;
  const float inverse = 1.0f / job.temperature, lse = job.lse[row], h = job.entropy[row];
  const float grad_lse = job.grad_lse[row], grad_entropy = job.grad_entropy[row];
  const auto gradient = [&](float value) {
    const float log_p = value * inverse - lse, p = expf(log_p);
    const float surprise = (p > 0 ? log_p : 0.0f) + h;
    return Element<T>::store(p * (grad_lse - grad_entropy * surprise) * inverse);
  };
  if (((reinterpret_cast<uintptr_t>(x + begin) | reinterpret_cast<uintptr_t>(out + begin)) & 15) == 0) {
    const int32_t windows = (end - begin) / W;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < windows; i += THREADS) {
      float value[W];
      Element<T>::unpack(reinterpret_cast<const uint4*>(x + begin)[i], value);
      T result[W];
#pragma unroll
      for (int j = 0; j < W; j++) result[j] = gradient(value[j]);
      uint4 raw;
      memcpy(&raw, result, 16);
      reinterpret_cast<uint4*>(out + begin)[i] = raw;
    }
    for (int32_t i = begin + windows * W + static_cast<int32_t>(threadIdx.x); i < end; i += THREADS)
      out[i] = gradient(Element<T>::load(x[i]));
  } else {
    for (int32_t i = begin + static_cast<int32_t>(threadIdx.x); i < end; i += THREADS)
      out[i] = gradient(Element<T>::load(x[i]));
  }
}

}  // namespace entrgi::cuda
