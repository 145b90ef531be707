// The threshold of top-p / top-k without a sort, the draw, and the confidences built on both.
// Included inside namespace entrgi::ENTRGI_ISA.
//
// Both filters keep the upper end of a row: entry v survives iff the weight of all strictly larger entries is within a
// limit (weight = mass and limit = p * total for top-p; weight = 1 and limit = k - 1 for top-k). A radix search over the
// order-preserving bit pattern finds the smallest surviving value exactly; masses are 24.40 fixed-point integers, so that
// sums do not depend on any order.

constexpr int64_t CANDIDATES = 16384;  // above this many the row itself is searched
constexpr int64_t PAIRWISE = 32;       // up to this many all pairs are compared
constexpr double FIXED = 1099511627776.0;  // 2^40

INLINE uint64_t ordered(double x) {
  uint64_t u;
  x += 0.0;  // -0 becomes +0: they are ties
  __builtin_memcpy(&u, &x, 8);
  return (u >> 63) ? ~u : u | 0x8000000000000000ull;
}
INLINE uint32_t ordered(float x) {
  uint32_t u = float_bits(x + 0.0f);
  return (u >> 31) ? ~u : u | 0x80000000u;
}
INLINE uint16_t ordered(bf16 x) {
  uint16_t u = x.bits == 0x8000 ? 0 : x.bits;
  return (uint16_t)((u >> 15) ? ~u : u | 0x8000u);
}
INLINE uint16_t ordered(f16 x) {
  bf16 b = {x.bits};
  return ordered(b);
}
INLINE void value_of(uint64_t key, double* x) {
  uint64_t u = (key >> 63) ? key & 0x7fffffffffffffffull : ~key;
  __builtin_memcpy(x, &u, 8);
}
INLINE void value_of(uint32_t key, float* x) { *x = bits_float((key >> 31) ? key & 0x7fffffffu : ~key); }
INLINE void value_of(uint16_t key, bf16* x) { x->bits = (uint16_t)((key >> 15) ? key & 0x7fffu : ~key); }
INLINE void value_of(uint16_t key, f16* x) { x->bits = (uint16_t)((key >> 15) ? key & 0x7fffu : ~key); }

struct Histogram {
  uint64_t weight[2048];
  uint32_t count[2048];
};

// What a thread needs for one row. The candidates are those entries that the filters can keep at all.
template <typename T>
struct Scratch {
  Histogram histogram;
  T value[CANDIDATES];
  int32_t index[CANDIDATES];
  uint64_t mass[CANDIDATES];
};

// The entries of a row that matter: a compacted list, or (index == null) the whole row.
template <typename T>
struct Entries {
  const T* value;
  const int32_t* index;
  int64_t count;
};

// exp((x - maximum) / temperature) as fixed point, `count` entries.
template <typename T>
INLINE void masses(const T* x, int64_t count, typename Store<T>::A top, Scale<typename Store<T>::A> scale, uint64_t* out) {
  typedef typename Store<T>::A A;
  constexpr int W = Lane<A>::W;
  A buffer[W];
  for (int64_t i = 0; i < count; i += W) {
    int rest = (int)(count - i < W ? count - i : W);
    store(vexp(scaled(rest == W ? load(x + i) : load_part(x + i, rest, (A)-INFINITY), set1(top), scale)), buffer);
    for (int j = 0; j < rest; j++) out[i + j] = (uint64_t)(int64_t)(buffer[j] * (A)FIXED);
  }
}

// radix_threshold() of at most PAIRWISE entries, by its definition: less work than clearing and reading a histogram.
template <typename T, bool MASS>
static T pairwise_threshold(const Entries<T>& e, uint64_t limit, const uint64_t* mass, uint64_t above) {
  typedef typename Store<T>::Key Key;
  Key keys[PAIRWISE], smallest = (Key)~(Key)0;
  for (int64_t i = 0; i < e.count; i++) keys[i] = ordered(e.value[i]);
  for (int64_t i = 0; i < e.count; i++) {
    uint64_t larger = above;
    for (int64_t j = 0; j < e.count; j++) larger += keys[j] > keys[i] ? (MASS ? mass[j] : 1) : 0;
    if (larger <= limit && keys[i] < smallest) smallest = keys[i];
  }
  T value;
  value_of(smallest, &value);
  return value;
}

// The smallest value whose strictly larger entries weigh at most `limit`. MASS: weights are masses, else ones. `above`:
// the weight of entries that are larger than all of `e`, at most `limit`.
template <typename T, bool MASS>
static T radix_threshold(const Entries<T>& e, uint64_t limit, typename Store<T>::A top,
                         Scale<typename Store<T>::A> scale, Scratch<T>* s, uint64_t above = 0) {
  typedef typename Store<T>::Key Key;
  constexpr int BITS = sizeof(Key) * 8;
  Histogram& h = s->histogram;
  const bool kept_masses = e.index != nullptr;  // the list is short enough to keep its masses between the passes
  if (MASS && kept_masses) masses(e.value, e.count, top, scale, s->mass);
  if (kept_masses && e.count <= PAIRWISE) return pairwise_threshold<T, MASS>(e, limit, s->mass, above);
  Key prefix = 0;
  for (int shift = BITS, width; shift > 0;) {
    width = shift >= 11 ? 11 : shift;
    if (BITS == 16) width = 8;
    const int below = shift - width;
    const uint32_t buckets = 1u << width;
    __builtin_memset(h.weight, 0, sizeof(uint64_t) * buckets);
    __builtin_memset(h.count, 0, sizeof(uint32_t) * buckets);
    constexpr int64_t CHUNK = 512;
    uint64_t chunk_mass[CHUNK];
    for (int64_t begin = 0; begin < e.count; begin += CHUNK) {
      int64_t count = e.count - begin < CHUNK ? e.count - begin : CHUNK;
      const uint64_t* mass = s->mass + begin;
      if (MASS && !kept_masses) {
        masses(e.value + begin, count, top, scale, chunk_mass);
        mass = chunk_mass;
      }
      for (int64_t i = 0; i < count; i++) {
        Key key = ordered(e.value[begin + i]);
        if (shift < BITS && (Key)(key >> (shift % BITS)) != prefix) continue;
        uint32_t bucket = (uint32_t)(key >> below) & (buckets - 1);
        h.weight[bucket] += MASS ? mass[i] : 1;
        h.count[bucket]++;
      }
    }
    uint32_t lowest = 0;
    uint64_t lowest_above = above, running = above;
    for (uint32_t b = buckets; b-- > 0;) {
      if (!h.count[b]) continue;
      if (running > limit) break;
      lowest = b;
      lowest_above = running;
      running += h.weight[b];
    }
    above = lowest_above;
    prefix = shift < BITS ? (Key)((Key)(prefix << width) | (Key)lowest) : (Key)lowest;
    shift = below;
  }
  T value;
  value_of(prefix, &value);
  return value;
}

// Entries of the row that are >= cutoff (and < end); the whole row when they are too many.
template <typename T>
INLINE Entries<T> candidates(const T* x, int64_t v, typename Store<T>::A cutoff, Scratch<T>* s,
                             typename Store<T>::A end = (typename Store<T>::A)INFINITY) {
  typedef typename Store<T>::A A;
  constexpr int W = Lane<A>::W;
  const auto bound = set1(cutoff);
  int64_t count = 0;
  for (int64_t i = 0; i < v; i += W) {
    int rest = (int)(v - i < W ? v - i : W);
    const auto value = rest == W ? load(x + i) : load_part(x + i, rest, (A)-INFINITY);
    uint32_t mask = mask_ge(value, bound) & ~mask_ge(value, set1(end));
    if (rest < W) mask &= (1u << rest) - 1;
    if (!mask) continue;
    if (count + W > CANDIDATES) return Entries<T>{x, nullptr, v};
    for (; mask; mask &= mask - 1) {
      int64_t at = i + __builtin_ctz(mask);
      s->value[count] = x[at];
      s->index[count++] = (int32_t)at;
    }
  }
  return Entries<T>{s->value, s->index, count};
}

// Mass of the entries that reach each of STEPS values, in double; one pass.
constexpr int STEPS = 8;
template <typename T>
static void masses_above(const T* x, int64_t v, typename Store<T>::A top, Scale<typename Store<T>::A> scale,
                         const typename Store<T>::A* at, double* mass) {
  typedef typename Store<T>::A A;
  typedef typename Lane<A>::V V;
  constexpr int W = Lane<A>::W;
  for (int j = 0; j < STEPS; j++) mass[j] = 0;
  for (int64_t begin = 0; begin < v; begin += STATS_BLOCK) {
    const int64_t end = v - begin < STATS_BLOCK ? v : begin + STATS_BLOCK;
    V sums[STEPS];
#pragma GCC unroll 8
    for (int j = 0; j < STEPS; j++) sums[j] = zero<A>();
    for (int64_t i = begin; i < end; i += W) {
      const V value = end - i >= W ? load(x + i) : load_part(x + i, (int)(end - i), (A)-INFINITY);
      const V e = vexp(scaled(value, set1(top), scale));
#pragma GCC unroll 8
      for (int j = 0; j < STEPS; j++) sums[j] += value >= set1(at[j]) ? e : zero<A>();
    }
#pragma GCC unroll 8
    for (int j = 0; j < STEPS; j++) mass[j] += sum<A>(sums[j]);
  }
}

// The threshold of top-p in a row with too many candidates: it is bracketed by the masses above a few values, until the
// entries within the bracket fit the list. `lo`: a value that more than the limit's mass reaches.
template <typename T>
static T bracketed_threshold(const T* x, int64_t v, uint64_t limit, typename Store<T>::A top,
                             Scale<typename Store<T>::A> scale, typename Store<T>::A lo, Scratch<T>* s) {
  typedef typename Store<T>::A A;
  A hi = (A)INFINITY, at[STEPS];
  uint64_t above = 0;
  Entries<T> e{x, nullptr, v};
  for (int pass = 0; pass < 5 && e.index == nullptr; pass++) {
    const A end = hi < top ? hi : top;
    double mass[STEPS];
    for (int j = 0; j < STEPS; j++) at[j] = lo + (end - lo) * ((A)(j + 1) / (A)(STEPS + 1));
    masses_above(x, v, top, scale, at, mass);
    for (int j = STEPS - 1; j >= 0; j--) {  // from the top: the first that more than the limit reach closes the bracket
      const uint64_t weight = (uint64_t)(mass[j] * FIXED);
      if (weight > limit) {
        if (at[j] > lo) lo = at[j];
        break;
      }
      if (at[j] < hi) {
        hi = at[j];
        above = weight;
      }
    }
    e = candidates(x, v, lo, s, hi);
  }
  if (e.index == nullptr) above = 0;  // ties without end: search the whole row
  return radix_threshold<T, true>(e, limit, top, scale, s, above);
}

// A value that at least k entries reach: the k-th largest of the maxima of equal blocks. -inf when k is too large for it.
template <typename T>
static typename Store<T>::A count_cutoff(const T* x, int64_t v, int64_t k, Scratch<T>* s) {
  typedef typename Store<T>::A A;
  constexpr int W = Lane<A>::W;
  int64_t vectors = v / W, group = ceil_div(vectors, CANDIDATES / W), blocks = 0;
  if (vectors == 0) return (A)-INFINITY;
  for (int64_t g = 0; g < vectors; g += group) {  // a block is one lane of `group` neighbouring vectors
    int64_t end = g + group < vectors ? g + group : vectors;
    auto m = load(x + g * W);
    for (int64_t i = g + 1; i < end; i++) m = vmax(load(x + i * W), m);
    A buffer[W];
    store(m, buffer);
    for (int i = 0; i < W; i++) from_acc(buffer[i], s->value + blocks++);
  }
  if (blocks < k) return (A)-INFINITY;
  Entries<T> e{s->value, s->index, blocks};
  return to_acc(radix_threshold<T, false>(e, (uint64_t)(k - 1), (A)0, reciprocal<A>(1.0), s));
}

// Candidates of the row and the value from which on they are kept.
template <typename T>
static Entries<T> filter_row(const SampleJob& job, const T* x, double top, double total, Scratch<T>* s, T* threshold) {
  typedef typename Store<T>::A A;
  const int64_t v = job.v;
  const bool by_mass = job.top_p < 1.0, by_count = job.top_k > 0 && job.top_k < v;
  const Scale<A> scale = reciprocal<A>(job.temperature);
  from_acc((A)-INFINITY, threshold);
  if (!by_mass && !by_count) return Entries<T>{x, nullptr, v};
  A cutoff = (A)-INFINITY;
  if (by_mass) {
    // Entries below it weigh less than (1 - p) total all together, so none of them can be in the nucleus; half of that
    // leaves room for rounding.
    double share = 0.5 * (1.0 - job.top_p) * total / (double)v;
    double c = top + job.temperature * ::log(share);
    cutoff = (A)(c - 1e-5 * (::fabs(c) + ::fabs(top)));
  } else {
    cutoff = count_cutoff(x, v, job.top_k, s);
  }
  Entries<T> e = candidates(x, v, cutoff, s);
  A best = (A)-INFINITY;
  if (by_mass) {
    const uint64_t limit = (uint64_t)(job.top_p > 0 ? job.top_p * total * FIXED : 0);
    *threshold = e.index == nullptr ? bracketed_threshold(x, v, limit, (A)top, scale, cutoff, s)
                                    : radix_threshold<T, true>(e, limit, (A)top, scale, s);
    best = to_acc(*threshold);
  }
  if (by_count) {
    Entries<T> largest = e;
    if (by_mass && e.index == nullptr) largest = candidates(x, v, count_cutoff(x, v, job.top_k, s), s);
    if (largest.count >= job.top_k) {
      const T t = radix_threshold<T, false>(largest, (uint64_t)(job.top_k - 1), (A)top, scale, s);
      if (to_acc(t) > best) *threshold = t;
    }
  }
  return e;
}

// --- Philox4x32-10 ----------------------------------------------------------------------------------------------------
INLINE vul mul32(vul a, uint32_t b) {  // 32 x 32 -> 64 in each lane
#if ENTRGI_LEVEL >= 3
  return (vul)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64((long long)b));
#elif ENTRGI_LEVEL >= 2
  return (vul)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x((long long)b));
#else
  return a * (uint64_t)b;
#endif
}
struct Words {
  vul x0, x1, x2, x3;
};
INLINE Words philox(vul c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  const uint64_t low = 0xffffffffull;
  vul a = c0, b = (c0 & 0) + c1, c = (c0 & 0) + c2, d = (c0 & 0) + c3;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; round++) {
    vul p0 = mul32(a, 0xD2511F53u), p1 = mul32(c, 0xCD9E8D57u);
    a = (p1 >> 32) ^ b ^ (uint64_t)k0;
    c = (p0 >> 32) ^ d ^ (uint64_t)k1;
    b = p1 & low;
    d = p0 & low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Words{a, b, c, d};
}

INLINE float natural_log(float x) { return ::logf(x); }
INLINE double natural_log(double x) { return ::log(x); }
INLINE float log_one_plus(float x) { return ::log1pf(x); }
INLINE double log_one_plus(double x) { return ::log1p(x); }
template <typename A>
INLINE A exponential(uint32_t high, uint32_t low) {
  const bool upper = high >> 31;
  if (upper) {
    high = ~high;
    low = ~low;
  }
  const A u = (A)high * (A)0x1p-32 + ((A)low + (A)0.5) * (A)0x1p-64;
  return upper ? -natural_log(u) : -log_one_plus(-u);
}

// The exponential race over the kept entries. An entry can only win if its uniform is below exp(shifted - best), since
// E >= u: that bound costs one exp, the logarithm is taken for the few that pass it.
template <typename T>
static int64_t race(const SampleJob& job, const Entries<T>& e, T threshold_, double top, int64_t row) {
  typedef typename Store<T>::A A;
  typedef typename Lane<A>::V V;
  constexpr int W = Lane<A>::W, W64 = WD;
  const A threshold = to_acc(threshold_);
  const Scale<A> scale = reciprocal<A>(job.temperature);
  const uint32_t row_low = (uint32_t)row, row_high = (uint32_t)((uint64_t)row >> 32);
  int64_t winner = -1;
  A best = (A)-INFINITY;
  const A lowest = sizeof(A) == 8 ? (A)-__DBL_MAX__ : (A)-__FLT_MAX__;  // -inf entries are never drawn
  A shifted[W], bound[W];
  uint64_t words[4][W64];
  const V vt = set1(threshold);
  for (int64_t i = 0; i < e.count; i += W) {
    int rest = (int)(e.count - i < W ? e.count - i : W);
    V x = rest == W ? load(e.value + i) : load_part(e.value + i, rest, (A)-INFINITY);
    uint32_t kept = mask_ge(x, vt) & mask_ge(x, set1(lowest));
    if (rest < W) kept &= (1u << rest) - 1;
    if (!kept) continue;
    V y = scaled(x, set1((A)top), scale);
    V limit = y - set1(best);  // log of the bound; 1e-4 covers the rounding of score and bound
    limit = limit > set1((A)50) ? set1((A)50) : limit;
    V b = vexp(limit) * (A)1.0001;
    // The smallest uniform is 2^-65: entries whose bound is below it cannot win.
    kept &= mask_ge(b, set1((A)0x1p-66));
    if (!kept) continue;
    store(y, shifted);
    store(b, bound);
    if (e.index == nullptr && W64 * 2 == W) {  // neighbours share a counter
      vul c0 = {};
      for (int j = 0; j < W64; j++) c0[j] = (uint64_t)(i >> 1) + j;
      Words w = philox(c0, job.step, row_low, row_high, job.seed);
      __builtin_memcpy(words[0], &w.x0, sizeof(vul));
      __builtin_memcpy(words[1], &w.x1, sizeof(vul));
      __builtin_memcpy(words[2], &w.x2, sizeof(vul));
      __builtin_memcpy(words[3], &w.x3, sizeof(vul));
    }
    for (int half = 0; half < W; half += W64) {
      if (!((kept >> half) & ((1u << W64) - 1))) continue;
      const bool shared = e.index == nullptr && W64 * 2 == W;
      if (!shared) {
        vul c0 = {};
        for (int j = 0; j < W64; j++) {
          int64_t at = i + half + j;
          c0[j] = (uint64_t)(e.index == nullptr ? at : at < e.count ? e.index[at] : 0) >> 1;
        }
        Words w = philox(c0, job.step, row_low, row_high, job.seed);
        __builtin_memcpy(words[0], &w.x0, sizeof(vul));
        __builtin_memcpy(words[1], &w.x1, sizeof(vul));
        __builtin_memcpy(words[2], &w.x2, sizeof(vul));
        __builtin_memcpy(words[3], &w.x3, sizeof(vul));
      }
      for (uint32_t m = (kept >> half) & ((1u << W64) - 1); m; m &= m - 1) {
        const int j = half + __builtin_ctz(m);
        const int64_t token = e.index == nullptr ? i + j : e.index[i + j];
        const int lane = shared ? j >> 1 : j - half, odd = (int)(token & 1) * 2;
        const uint32_t high = (uint32_t)words[odd][lane], low = (uint32_t)words[odd + 1][lane];
        if ((A)high * (A)0x1p-32 > bound[j]) continue;
        const A score = shifted[j] - natural_log(exponential<A>(high, low));
        if (score > best || (score == best && token < winner)) {
          best = score;
          winner = token;
        }
      }
    }
  }
  return winner;
}

template <typename T>
static void sample_rows(const SampleJob& job, int64_t begin, int64_t end, void* scratch) {
  typedef typename Store<T>::A A;
  Scratch<T>* s = (Scratch<T>*)scratch;
  for (int64_t n = begin; n < end; n++) {
    const T* x = (const T*)job.logits.data + n * job.logits.stride;
    const double top = ((const A*)job.maximum)[n], total = ((const A*)job.total)[n];
    if (top != top) {
      job.tokens[n] = -1;
      continue;
    }
    T threshold;
    Entries<T> e = filter_row(job, x, top, total, s, &threshold);
    job.tokens[n] = race(job, e, threshold, top, job.rows[n]);
  }
}

template <typename T>
static void confidence_rows(const ConfidenceJob& job, int64_t begin, int64_t end, void* scratch) {
  typedef typename Store<T>::A A;
  typedef typename Lane<A>::V V;
  constexpr int W = Lane<A>::W;
  Scratch<T>* s = (Scratch<T>*)scratch;
  const SampleJob& f = job.filter;
  const Scale<A> scale = reciprocal<A>(f.temperature);
  for (int64_t n = begin; n < end; n++) {
    const T* x = (const T*)f.logits.data + n * f.logits.stride;
    const double top = ((const A*)f.maximum)[n];
    A* out = (A*)job.out + n;
    const int64_t token = f.tokens[n] < 0 ? 0 : f.tokens[n];
    if (top != top) {
      *out = (A)NAN;
      continue;
    }
    if (job.alg == Confidence::anchor) {
      *out = token < f.v ? to_acc(x[token]) : (A)NAN;
      continue;
    }
    T threshold_;
    Entries<T> e = filter_row(f, x, top, (double)((const A*)f.total)[n], s, &threshold_);
    const A threshold = to_acc(threshold_);
    double total = 0, product = 0;
    A first = (A)-INFINITY, second = (A)-INFINITY;
    constexpr int64_t CHUNK = 2048;  // sums go to double once per chunk
    for (int64_t start = 0; start < e.count; start += CHUNK) {
      const int64_t stop = start + CHUNK < e.count ? start + CHUNK : e.count;
      V t = zero<A>(), p = zero<A>();
      for (int64_t i = start; i < stop; i += W) {
        int rest = (int)(stop - i < W ? stop - i : W);
        V value = rest == W ? load(e.value + i) : load_part(e.value + i, rest, (A)-INFINITY);
        V y = scaled(value, set1((A)top), scale);
        V m = vexp(y);
        m = value >= set1(threshold) ? m : zero<A>();
        t += m;
        p += m * y;
        if (job.alg == Confidence::topk_margin && mask_ge(value, set1(second))) {
          A buffer[W];
          store(value, buffer);
          for (int j = 0; j < rest; j++) {
            if (buffer[j] > first) {
              second = first;
              first = buffer[j];
            } else if (buffer[j] > second) {
              second = buffer[j];
            }
          }
        }
      }
      total += sum<A>(t);
      product += sum<A>(p);
    }
    auto probability = [&](A value) {
      return value >= threshold && value > -INFINITY ? ::exp(((double)value - top) / f.temperature) / total : 0.0;
    };
    if (job.alg == Confidence::entropy) {
      double h = ::log(total) - product / total;
      *out = (A)(h > 0 ? -h : 0);
    } else if (job.alg == Confidence::maskgit_plus) {
      *out = token < f.v ? (A)probability(to_acc(x[token])) : (A)NAN;
    } else {
      *out = (A)(probability(first) - probability(second));
    }
  }
}
