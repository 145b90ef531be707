// A filtered draw in one launch, a block a row: statistics, the exact threshold of top-p and top-k without a sort, the
// exponential race; and confidences under the same filter.
//
// Both filters keep the upper end of a row: an entry survives iff the mass of all strictly larger ones is at most
// top_p, and their number below top_k. Both conditions are monotone in the value, so that one radix search over ordered
// keys finds the smallest surviving key. Masses are 24.40 fixed-point integers: sums do not depend on any order, and
// neither does anything else after the statistics, whose order is fixed. Entries too small to matter are left out first:
// those below probability (1 - top_p) / (2 V) weigh less than 1 - top_p together, so none of them is kept. The others
// go to a list in shared memory, which the search and the race read; a row with too many is read again instead, by a
// radix pass that tells from where on its entries fit the list.
#pragma once
#include <stddef.h>

#include "philox.cuh"
#include "statistics.cuh"

namespace entrgi::cuda {

constexpr float FIXED = 0x1p40f;
constexpr int DIGIT = 10;  // bits of a radix pass
constexpr int BINS = 1 << DIGIT;

struct Weight {  // of entries: mass in fixed point, and number
  unsigned long long mass = 0;
  unsigned count = 0, unused = 0;
};

// What is still open: the threshold's key is in [low, low + 2^bits). `above`: the weight of all entries beyond that
// range. `reached`: how many entries have keys >= low.
struct Search {
  uint32_t low;
  int32_t bits;
  Weight above;
  uint32_t reached;
};

struct Winner {
  float score = -INFINITY;
  int32_t token = INT32_MAX;
};

struct Kept {  // sums over the entries that a filter keeps, and their two largest values
  float s = 0, t = 0, first = -INFINITY, second = -INFINITY;
};

template <int THREADS, int CAPACITY>
struct FilterShared {
  union {
    Moments moments[THREADS / LANES];
    Winner winners[THREADS / LANES];
    Kept kept[THREADS / LANES];
    Weight weights[THREADS / LANES];
  };
  Search search;
  uint32_t filled, lowest;
  unsigned long long mass[BINS];
  uint32_t count[BINS];
  // The list last: a launch that filters nothing is given no memory for it.
  float value[CAPACITY];
  int32_t index[CAPACITY];
};

// What the filter of one row needs besides the row.
struct Cut {
  float m, c;                // the maximum, and the exponent's factor
  bool by_mass, by_count;
  unsigned long long limit;  // masses strictly above a kept key are at most this
  unsigned long long k;      // and fewer than this many entries
};

DEVICE unsigned long long fixed_mass(float x, const Cut& cut) {
  return static_cast<unsigned long long>(exp2_fast((x - cut.m) * cut.c) * FIXED);
}

// f(x, index) for the entries of the list or, where there is none, of the row.
template <typename T, int THREADS, int CAPACITY, typename F>
DEVICE void each(const FilterShared<THREADS, CAPACITY>& shared, bool listed, const T* row, int32_t v, const F& f) {
  constexpr int W = WIDE<T>;
  if (listed) {
    for (uint32_t i = threadIdx.x; i < shared.filled; i += THREADS) f(shared.value[i], shared.index[i]);
  } else {
    walk<T, THREADS, 1>(row, 0, v, [&](const float(&x)[W], int32_t index) {
#pragma unroll
      for (int j = 0; j < W; j++)
        if (x[j] > -INFINITY) f(x[j], index + j);
    });
  }
}

// Puts the entries >= cut into the list, in any order; false when they are more than it holds.
template <typename T, int THREADS, int CAPACITY>
DEVICE bool collect(FilterShared<THREADS, CAPACITY>& shared, const T* row, int32_t v, float cut) {
  constexpr int W = WIDE<T>;
  __syncthreads();
  if (threadIdx.x == 0) shared.filled = 0;
  __syncthreads();
  walk<T, THREADS, 4>(row, 0, v, [&](const float(&x)[W], int32_t index) {
    int found = 0;
#pragma unroll
    for (int j = 0; j < W; j++) found += x[j] >= cut && x[j] > -INFINITY;
    // A list found full stays full: what others add meanwhile changes nothing.
    if (found == 0 || *static_cast<volatile uint32_t*>(&shared.filled) > CAPACITY) return;
    uint32_t place = atomicAdd(&shared.filled, static_cast<uint32_t>(found));
#pragma unroll
    for (int j = 0; j < W; j++) {
      if (!(x[j] >= cut && x[j] > -INFINITY)) continue;
      if (place < CAPACITY) {
        shared.value[place] = x[j];
        shared.index[place] = index + j;
      }
      place++;
    }
  });
  __syncthreads();
  return shared.filled <= CAPACITY;
}

DEVICE Weight operator+(const Weight& a, const Weight& b) {
  Weight r;
  r.mass = a.mass + b.mass;
  r.count = a.count + b.count;
  return r;
}

// The weight in all threads before this one.
template <int THREADS>
DEVICE Weight sum_before(const Weight& mine, Weight* slots) {
  Weight inclusive = mine;
#pragma unroll
  for (int offset = 1; offset < LANES; offset *= 2) {
    Weight other;
    other.mass = __shfl_up_sync(ALL_LANES, inclusive.mass, offset);
    other.count = __shfl_up_sync(ALL_LANES, inclusive.count, offset);
    if (lane_of_thread() >= offset) inclusive = inclusive + other;
  }
  if (lane_of_thread() == LANES - 1) slots[warp_of_thread()] = inclusive;
  __syncthreads();
  Weight before;
  for (int i = 0; i < warp_of_thread(); i++) before = before + slots[i];
  __syncthreads();
  before.mass += inclusive.mass - mine.mass;
  before.count += inclusive.count - mine.count;
  return before;
}

// One radix pass: the next digit of the search's range.
template <typename T, int THREADS, int CAPACITY>
DEVICE void narrow(FilterShared<THREADS, CAPACITY>& shared, bool listed, const T* row, int32_t v, const Cut& cut) {
  static_assert(BINS % THREADS == 0, "equal shares of bins");
  constexpr int SHARE = BINS / THREADS;
  const Search search = shared.search;
  const int width = search.bits < DIGIT ? search.bits : DIGIT, below = search.bits - width;
  for (int i = static_cast<int>(threadIdx.x); i < BINS; i += THREADS) {
    shared.mass[i] = 0;
    shared.count[i] = 0;
  }
  if (threadIdx.x == 0) shared.lowest = BINS;
  __syncthreads();
  each<T>(shared, listed, row, v, [&](float x, int32_t) {
    const uint32_t key = ordered_key<T>(x);
    const uint64_t offset = static_cast<uint64_t>(key) - search.low;  // wraps, and so fails, below the range
    if (offset >> search.bits) return;
    const uint32_t bin = static_cast<uint32_t>(offset >> below);
    if (cut.by_mass) atomicAdd(&shared.mass[bin], fixed_mass(x, cut));
    atomicAdd(&shared.count[bin], 1u);
  });
  __syncthreads();
  // Shares of bins from the top down; each thread finds the lowest of its bins that a key may be kept in.
  Weight mine;
  const int top = BINS - 1 - static_cast<int>(threadIdx.x) * SHARE;
#pragma unroll
  for (int i = 0; i < SHARE; i++) {
    mine.mass += shared.mass[top - i];
    mine.count += shared.count[top - i];
  }
  Weight above = search.above + sum_before<THREADS>(mine, shared.weights), at_lowest;
  int lowest = BINS;
#pragma unroll
  for (int i = 0; i < SHARE; i++) {
    const int bin = top - i;
    if (shared.count[bin] > 0 && above.mass <= cut.limit && above.count < cut.k) {
      lowest = bin;
      at_lowest = above;
    }
    above.mass += shared.mass[bin];
    above.count += shared.count[bin];
  }
  if (lowest < BINS) atomicMin(&shared.lowest, static_cast<uint32_t>(lowest));
  __syncthreads();
  if (lowest < BINS && shared.lowest == static_cast<uint32_t>(lowest)) {
    shared.search.low = search.low + (static_cast<uint32_t>(lowest) << below);
    shared.search.bits = below;
    shared.search.above = at_lowest;
    shared.search.reached = at_lowest.count + shared.count[lowest];
  }
  __syncthreads();
}

// The smallest key that the filter keeps. `listed` tells whether all kept entries are in the list.
template <typename T, int THREADS, int CAPACITY>
DEVICE uint32_t threshold(FilterShared<THREADS, CAPACITY>& shared, const FilterJob& job, const T* row, float maximum,
                          float logsum, Cut& cut, bool& listed) {
  const int32_t v = job.logits.v;
  // Top-k alone has no share of mass that can be left out; this one leaves k entries in most rows.
  const float missing = cut.by_mass ? static_cast<float>(1.0 - job.top_p) : 1e-3f;
  const float log_share = logsum + logf(missing) - logf(2.0f * static_cast<float>(v));
  float lower = maximum + job.temperature * log_share;
  lower -= 1e-5f * (fabsf(lower) + fabsf(maximum));  // for the rounding of all this
  uint32_t low = ordered_key<T>(lower);
  listed = collect<T>(shared, row, v, key_value<T>(low));
  if (listed && !cut.by_mass && shared.filled < cut.k) {  // the k-th largest is below the cut
    low = 0;
    listed = false;
  }
  if (threadIdx.x == 0) {
    const uint32_t span = ordered_key<T>(maximum) - low;
    shared.search = Search{low, 32 - __clz(static_cast<int>(span)), Weight(), UINT32_MAX};
  }
  __syncthreads();
  while (shared.search.bits > 0) {
    narrow<T>(shared, listed, row, v, cut);
    if (!listed && shared.search.reached <= CAPACITY)
      listed = collect<T>(shared, row, v, key_value<T>(shared.search.low));
  }
  return shared.search.low;
}

DEVICE Cut make_cut(const FilterJob& job, const Moments& r, float total) {
  Cut cut;
  cut.m = r.m;
  cut.c = LOG2E / job.temperature;
  cut.by_mass = job.top_p < 1.0;
  cut.by_count = job.top_k < job.logits.v;
  const double fixed = job.top_p * static_cast<double>(total) * static_cast<double>(FIXED);
  cut.limit = cut.by_mass ? static_cast<unsigned long long>(fixed > 0 ? fixed : 0) : ~0ull;
  cut.k = cut.by_count ? static_cast<unsigned long long>(job.top_k) : ~0ull;
  return cut;
}

DEVICE bool filters(const FilterJob& job) { return job.top_p < 1.0 || job.top_k < job.logits.v; }

// FULL: leaves the statistics of temperature 1 and, second, of the filter's; without it the latter alone are formed.
template <typename T, int THREADS, int BLOCKS, int CAPACITY, bool FULL>
__global__ void __launch_bounds__(THREADS, BLOCKS) draw_kernel(DrawJob job) {
  auto& shared = shared_memory<FilterShared<THREADS, CAPACITY>>();
  const FilterJob& filter = job.filter;
  const int64_t row = blockIdx.x;
  const T* x = row_of<T>(filter.logits, row);
  const int32_t v = filter.logits.v;
  const Scales k(FULL ? 1.0f : filter.temperature, FULL ? filter.temperature : 0.0f);
  const Moments r = block_moments<T, THREADS, FULL, FULL>(x, 0, v, k, shared.moments);
  const RowStatistics s = finish(r, FULL ? 1.0f : filter.temperature, filter.temperature);
  if (FULL && threadIdx.x == 0) {
    write(s, job.statistics, filter.logits.n, row, true);
    job.argmax[row] = s.bad ? 0 : s.argmax;
  }
  if (s.bad) {
    if (threadIdx.x == 0) job.tokens[row] = -1;
    return;
  }
  const float logsum = FULL ? s.logsum2 : s.logsum;
  Cut cut = make_cut(filter, r, FULL ? r.s2 : r.s);
  bool listed = false;
  const uint32_t least = filters(filter) ? threshold<T>(shared, filter, x, s.maximum, logsum, cut, listed) : 0;
  // An exponential race: token v arrives at time E_v / p_v, the first one wins.
  const float inverse = 1.0f / filter.temperature;
  Noise noise(job.rng, job.rows[row]);
  Winner mine;
  each<T>(shared, listed, x, v, [&](float value, int32_t index) {
    if (ordered_key<T>(value) < least) return;
    const float score = (value - cut.m) * inverse - noise(index);
    if (score > mine.score || (score == mine.score && index < mine.token)) mine = Winner{score, index};
  });
  const Winner best = block_merge<THREADS>(mine, shared.winners, [](const Winner& a, const Winner& b) {
    return b.score > a.score || (b.score == a.score && b.token < a.token) ? b : a;
  });
  if (threadIdx.x == 0) job.tokens[row] = best.token;
}

// Confidence of given tokens under the filtered distribution. The sums are over the row, in the order of `walk`.
template <typename T, int THREADS, int BLOCKS, int CAPACITY>
__global__ void __launch_bounds__(THREADS, BLOCKS) confidence_kernel(ConfidenceJob job) {
  auto& shared = shared_memory<FilterShared<THREADS, CAPACITY>>();
  const FilterJob& filter = job.filter;
  const int64_t row = blockIdx.x;
  const T* x = row_of<T>(filter.logits, row);
  const int32_t v = filter.logits.v;
  const Scales k(filter.temperature, 0.0f);
  const Moments r = block_moments<T, THREADS, true, false>(x, 0, v, k, shared.moments);
  const RowStatistics s = finish(r, filter.temperature, filter.temperature);
  const int64_t token = job.tokens[row] < 0 ? 0 : job.tokens[row];
  const float own = token < v ? Element<T>::load(x[token]) : bits_float(0x7fc00000u);
  if (s.bad || job.alg == Confidence::anchor) {
    if (threadIdx.x == 0) job.out[row] = s.bad ? s.maximum : own;
    return;
  }
  const bool filtered = filters(filter);
  Cut cut = make_cut(filter, r, r.s);
  uint32_t least = 0;
  Kept all;
  all.s = r.s;
  all.t = r.t;
  if (filtered) {
    bool listed;
    least = threshold<T>(shared, filter, x, s.maximum, s.logsum, cut, listed);
  }
  if (filtered || job.alg == Confidence::topk_margin) {
    Kept mine;
    each<T>(shared, false, x, v, [&](float value, int32_t) {
      if (ordered_key<T>(value) < least) return;
      const float d = value - cut.m, e = exp2_fast(d * cut.c);
      mine.s += e;
      mine.t += e * d;
      mine.second = fmaxf(mine.second, fminf(mine.first, value));
      mine.first = fmaxf(mine.first, value);
    });
    all = block_merge<THREADS>(mine, shared.kept, [](const Kept& a, const Kept& b) {
      Kept r;
      r.s = a.s + b.s;
      r.t = a.t + b.t;
      r.first = fmaxf(a.first, b.first);
      r.second = fmaxf(fminf(a.first, b.first), fmaxf(a.second, b.second));
      return r;
    });
  }
  if (threadIdx.x != 0) return;
  const float inverse = 1.0f / filter.temperature;
  if (job.alg == Confidence::entropy) {
    job.out[row] = -fmaxf(logf(all.s) - all.t / all.s * inverse, 0.0f);
  } else if (job.alg == Confidence::maskgit_plus) {
    job.out[row] = own != own || ordered_key<T>(own) >= least ? expf((own - cut.m) * inverse) / all.s : 0.0f;
  } else {
    job.out[row] = (1.0f - expf((all.second - cut.m) * inverse)) / all.s;
  }
}

}  // namespace entrgi::cuda
