// Row statistics in one pass over the logits, and the gradient of (log-sum-exp, entropy).
// Included inside namespace entrgi::ENTRGI_ISA.

constexpr int64_t STATS_BLOCK = 2048;  // elements; small enough to stay in L1 between the two looks at it

// Running sums of exp(y) and exp(y) y, y = (x - maximum) / temperature, in double.
struct Channel {
  double total = 0, product = 0;

  void move(double shift) {  // the maximum rose: every y changes by shift <= 0
    double factor = ::exp(shift);
    product = total > 0 && factor > 0 ? factor * (product + shift * total) : 0;  // the shift may be -inf
    total = factor * total;
  }
  double entropy() const {
    double h = ::log(total) - product / total;
    return h > 0 ? h : 0;
  }
};

struct RowStats {
  double maximum = -INFINITY;
  Channel at_temperature, at_one;
  int64_t argmax = 0;
  bool bad = false;
};

template <typename T, bool PRODUCT>
INLINE void add_block(const T* x, int64_t count, double maximum_, double temperature, Channel& channel) {
  typedef typename Store<T>::A A;
  typedef typename Lane<A>::V V;
  constexpr int W = Lane<A>::W;
  const Scale<A> scale = reciprocal<A>(temperature);
  const V top = set1((A)maximum_);
  V t0 = zero<A>(), t1 = zero<A>(), p0 = zero<A>(), p1 = zero<A>();
  int64_t i = 0;
  for (; i + 2 * W <= count; i += 2 * W) {
    V y0 = scaled(load(x + i), top, scale), y1 = scaled(load(x + i + W), top, scale);
    V e0 = vexp(y0), e1 = vexp(y1);
    t0 += e0;
    t1 += e1;
    if (PRODUCT) {
      p0 += e0 * y0;
      p1 += e1 * y1;
    }
  }
  for (; i < count; i += W) {
    int rest = (int)(count - i < W ? count - i : W);
    V y0 = scaled(load_part(x + i, rest, (A)-INFINITY), top, scale), e0 = vexp(y0);
    t0 += e0;
    if (PRODUCT) p0 += e0 * y0;
  }
  channel.total += sum<A>(t0 + t1);
  if (PRODUCT) channel.product += sum<A>(p0 + p1);
}

template <typename T>
INLINE void block_maximum(const T* x, int64_t count, typename Store<T>::A* top, bool* bad) {
  typedef typename Store<T>::A A;
  typedef typename Lane<A>::V V;
  constexpr int W = Lane<A>::W;
  const V infinity = set1((A)INFINITY);
  V m0 = -infinity, m1 = -infinity;
  // A vector of running "below +inf" flags: NaN and +inf both fail the comparison.
  auto good0 = m0 < infinity, good1 = good0;
  int64_t i = 0;
  for (; i + 2 * W <= count; i += 2 * W) {
    V a = load(x + i), b = load(x + i + W);
    m0 = vmax(a, m0);
    m1 = vmax(b, m1);
    good0 &= a < infinity;
    good1 &= b < infinity;
  }
  for (; i < count; i += W) {
    int rest = (int)(count - i < W ? count - i : W);
    V a = load_part(x + i, rest, (A)-INFINITY);
    m0 = vmax(a, m0);
    good0 &= a < infinity;
  }
  *top = maximum<A>(vmax(m0, m1));
  V flag = (good0 & good1) ? zero<A>() : zero<A>() + (A)1;
  *bad = maximum<A>(flag) > 0;
}

// TOTAL: the sum at `temperature`. ENTROPY: the entropy there, too. UNIT: the entropy at temperature 1.
template <typename T, bool TOTAL, bool ENTROPY, bool UNIT>
static RowStats row_stats(const T* x, int64_t v, double temperature) {
  typedef typename Store<T>::A A;
  RowStats s;
  int64_t where = 0;
  for (int64_t begin = 0; begin < v; begin += STATS_BLOCK) {
    int64_t count = v - begin < STATS_BLOCK ? v - begin : STATS_BLOCK;
    A top;
    bool bad;
    block_maximum(x + begin, count, &top, &bad);
    s.bad |= bad;
    if (s.bad) return s;
    if ((double)top > s.maximum) {
      if (s.maximum > -INFINITY) {
        s.at_temperature.move((s.maximum - (double)top) / temperature);
        if (UNIT) s.at_one.move(s.maximum - (double)top);
      }
      s.maximum = top;
      where = begin;
    }
    if (s.maximum == -INFINITY) continue;
    if (TOTAL) add_block<T, ENTROPY>(x + begin, count, s.maximum, temperature, s.at_temperature);
    if (UNIT) add_block<T, true>(x + begin, count, s.maximum, 1.0, s.at_one);
  }
  if (s.maximum == -INFINITY) s.bad = true;
  if (!s.bad)
    for (s.argmax = where; (double)to_acc(x[s.argmax]) != s.maximum; s.argmax++) {
    }
  return s;
}

template <typename T>
static void stats_rows(const StatsJob& job, int64_t begin, int64_t end) {
  typedef typename Store<T>::A A;
  const double nan = NAN, tau = job.temperature;
  for (int64_t n = begin; n < end; n++) {
    const T* x = (const T*)job.logits.data + n * job.logits.stride;
    RowStats s;
    double unit = 0;
    if (job.entropy_unit && tau != 1.0) {
      s = row_stats<T, true, false, true>(x, job.v, tau);
      unit = s.bad ? nan : s.at_one.entropy();
    } else if (job.entropy || job.entropy_unit) {
      s = row_stats<T, true, true, false>(x, job.v, tau);
      unit = s.bad ? nan : s.at_temperature.entropy();
    } else if (job.total || job.lse) {
      s = row_stats<T, true, false, false>(x, job.v, tau);
    } else {
      s = row_stats<T, false, false, false>(x, job.v, tau);
    }
    const Channel& c = s.at_temperature;
    if (job.maximum) ((A*)job.maximum)[n] = (A)(s.bad ? nan : s.maximum);
    if (job.total) ((A*)job.total)[n] = (A)(s.bad ? nan : c.total);
    if (job.lse) ((A*)job.lse)[n] = (A)(s.bad ? nan : s.maximum / tau + ::log(c.total));
    if (job.entropy) ((A*)job.entropy)[n] = (A)(s.bad ? nan : c.entropy());
    if (job.entropy_unit) ((A*)job.entropy_unit)[n] = (A)unit;
    if (job.argmax) {
      // A bad row has no meaningful argmax; the index torch gives (first NaN, else first maximum) is as good as any.
      int64_t best = s.argmax;
      if (s.bad) {
        best = 0;
        for (int64_t i = 0; i < job.v; i++) {
          A a = to_acc(x[i]), b = to_acc(x[best]);
          if (a != a) {
            best = i;
            break;
          }
          if (a > b) best = i;
        }
      }
      job.argmax[n] = best;
    }
  }
}

template <typename T>
static void entropy_backward_rows(const EntropyBackwardJob& job, int64_t begin, int64_t end) {
  typedef typename Store<T>::A A;
  typedef typename Lane<A>::V V;
  constexpr int W = Lane<A>::W;
  const Scale<A> scale = reciprocal<A>(job.temperature);
  for (int64_t n = begin; n < end; n++) {
    const T* x = (const T*)job.logits.data + n * job.logits.stride;
    T* out = (T*)job.out.data + n * job.out.stride;
    const A rest_ = ((const A*)job.norm.rest)[n], h_ = ((const A*)job.entropy)[n];
    const V shift = set1(((const A*)job.norm.shift)[n]), norm = set1(rest_), h = set1(h_);
    const A bad = rest_ == rest_ ? (A)0 : (A)NAN;  // vexp does not keep NaN
    const V gl = set1(((const A*)job.grad_lse)[n] + bad), gh = set1(((const A*)job.grad_entropy)[n]);
    for (int64_t i = 0; i < job.v; i += W) {
      int rest = (int)(job.v - i < W ? job.v - i : W);
      V value = rest == W ? load(x + i) : load_part(x + i, rest, (A)-INFINITY);
      V log_p = log_probability(value, shift, norm, scale);
      V p = vexp(log_p);
      V surprise = (p > zero<A>() ? log_p : zero<A>()) + h;
      V g = p * (gl - gh * surprise) * scale.high;
      if (rest == W)
        store(g, out + i);
      else
        store_part(g, out + i, rest);
    }
  }
}
