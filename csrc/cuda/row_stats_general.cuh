// The row kernel for everything else: target probabilities, column weights, more statistics, scale and softcap, all
// asked for at run time. A pass for the max, one for the sums relative to it, one for the gradient; the row is read
// once from memory where it fits shared memory. Branches on what is wanted stand around whole vectors, never inside
// their loops.
#pragma once
#include "row_stats.cuh"

namespace fastloss {

struct Peak {
  float max;  // over the rest
  float best; // over all columns, and the lowest column that holds it
  int at;
};

__device__ inline Peak merge(const Peak &a, const Peak &b) {
  const bool first = a.best > b.best || (a.best == b.best && a.at < b.at);
  return {fmaxf(a.max, b.max), first ? a.best : b.best, first ? a.at : b.at};
}

struct Sums {
  float exp, exp_z, z, z_square, exp_tempered, prob_z, mass; // z relative to ref, each over the columns that count
};

__device__ inline Sums merge(const Sums &a, const Sums &b) {
  return {a.exp + b.exp,       a.exp_z + b.exp_z, a.z + b.z, a.z_square + b.z_square, a.exp_tempered + b.exp_tempered,
          a.prob_z + b.prob_z, a.mass + b.mass};
}

// W values of a row that may lie anywhere: one, or as many as make whole 16-byte vectors.
template <class Q, int W> __device__ void load_values(const Q *from, float (&x)[W]) {
  constexpr int N = kWidth<Q>;
  if constexpr (W >= N) {
    if (is_aligned(from)) {
#pragma unroll
      for (int v = 0; v < W; v += N) {
        float y[N];
        unpack<Q>(__ldg(reinterpret_cast<const uint4 *>(from + v)), y);
#pragma unroll
        for (int k = 0; k < N; ++k) x[v + k] = y[k];
      }
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < W; ++k) x[k] = to_float(from[k]);
}

// W logits of one row and where they stand: a vector, or a single column.
template <int W> struct Columns {
  float z[W];
  int first;
};

template <class T> class GeneralRow {
public:
  static constexpr int N = kWidth<T>;

  __device__ GeneralRow(const RowStats &p, int64_t row, const Target &target, int slices, int rank, uint4 *kept)
      : p_(p), row_(row), target_(target), kept_(kept) {
    logits_ = static_cast<const T *>(p.logits) + row * p.ld;
    slice_ = slice_of(logits_, int(p.v), target.column, slices, rank);
    single_ = slice_.single >= 0 ? to_float(logits_[slice_.single]) : 0; // before a gradient may overwrite it
    inner_ = p.softcap == 0 ? p.scale : p.scale / p.softcap;
    inverse_cap_ = p.softcap == 0 ? 0 : 1 / p.softcap;
    if (target.column >= 0) target_.logit = z_of(to_float(logits_[target.column]));
    tempered_log2e_ = p.want & kTempered ? kLog2e / p.temperature[row] : 0;
  }

  __device__ float target_logit() const { return target_.logit; }
  __device__ void set_max(float max) { ref_ = max == -kInf ? 0 : max; }
  __device__ float ref() const { return ref_; }

  // The slice to shared memory, if it stays there. A thread only reads what it copied itself: no barrier.
  __device__ void load() const {
    if (!kept_) return;
    for (int i = threadIdx.x; i < slice_.count; i += blockDim.x) cp_async16(kept_ + i, vectors() + i);
    cp_async_commit();
    cp_async_wait<0>();
  }

  __device__ Peak peak() {
    Peak peak{-kInf, -kInf, int(p_.v)};
    each([&](const auto &c, bool own) {
      constexpr int W = sizeof(c.z) / sizeof(float);
      if (!own)
#pragma unroll
        for (int k = 0; k < W; ++k) peak.max = fmaxf(peak.max, c.z[k]);
      if (!(p_.want & kArgmax)) return;
      Peak here{peak.max, c.z[0], c.first};
#pragma unroll
      for (int k = 1; k < W; ++k)
        if (c.z[k] > here.best) here.best = c.z[k], here.at = c.first + k;
      peak = merge(peak, here);
    });
    return peak;
  }

  __device__ Sums sums() {
    Sums sums{};
    each([&](const auto &c, bool own) { add(sums, c, own); });
    return sums;
  }

  // The coefficients of the gradient, and what makes exponentials of probabilities.
  struct Terms {
    float own, rest, rest_z, column, linear, rest_t, arg, inverse, inverse_t;
    int argmax, want;
  };

  __device__ void write_gradient(const Terms &t) {
    T *g = static_cast<T *>(p_.dlogits) + row_ * p_.ld_out;
    const bool aligned = is_aligned(g + slice_.column);
    each([&](const auto &c, bool own) {
      constexpr int W = sizeof(c.z) / sizeof(float);
      float d[W];
      differentiate(t, c, own, d);
      if constexpr (W == 1) store(g[c.first], d[0]);
      else put(g + c.first, aligned, d);
    });
  }

private:
  __device__ const uint4 *vectors() const { return reinterpret_cast<const uint4 *>(logits_ + slice_.column); }
  __device__ float z_of(float logit) const {
    return p_.softcap == 0 ? logit * inner_ : p_.softcap * tanhf(logit * inner_);
  }
  __device__ Columns<N> columns(const uint4 &raw, int i) const {
    Columns<N> c;
    unpack<T>(raw, c.z);
#pragma unroll
    for (float &z : c.z) z = z_of(z);
    c.first = slice_.column + i * N;
    return c;
  }
  __device__ Columns<1> single() const { return {{z_of(single_)}, slice_.single}; }

  // f(columns, is it the target) for all columns of this thread.
  template <class F> __device__ void each(F f) {
    const int step = blockDim.x;
    auto load = [&](int i) { return i >= slice_.count ? uint4{} : kept_ ? kept_[i] : load_stream(vectors() + i); };
    // The next vectors are on their way while one is worked on. f stands here once: it is long.
    uint4 next = load(threadIdx.x), later = load(threadIdx.x + step);
#pragma unroll 1
    for (int i = threadIdx.x; i < slice_.count; i += step) {
      const uint4 raw = next;
      next = later;
      later = load(i + 2 * step);
      if (i != slice_.skip) f(columns(raw, i), false);
    }
    if (slice_.single >= 0) f(single(), slice_.single == target_.column);
  }

  template <int W> __device__ void weights(int first, float (&c)[W]) const {
    if (p_.column_weight) load_values(p_.column_weight + first, c);
    else
#pragma unroll
      for (float &x : c) x = 1;
  }
  // q_j c_j
  template <int W> __device__ void probabilities(int first, float (&q)[W]) const {
    const int64_t at = row_ * p_.ld_prob + first;
    float c[W];
    if (p_.prob_dtype == kFloat32) load_values(static_cast<const float *>(p_.prob) + at, q);
    else load_values(static_cast<const T *>(p_.prob) + at, q);
    weights(first, c);
#pragma unroll
    for (int k = 0; k < W; ++k) q[k] *= c[k];
  }

  template <int W> __device__ void add(Sums &sums, const Columns<W> &c, bool own) const {
    if (!own) {
      if (p_.want & kEntropy)
#pragma unroll
        for (float z : c.z) {
          const float x = z - ref_, e = exp2_approx(x * kLog2e);
          sums.exp += e;
          sums.exp_z += e == 0 ? 0 : e * x; // not 0 * inf
        }
      else
#pragma unroll
        for (float z : c.z) sums.exp += exp2_approx((z - ref_) * kLog2e);
      if (p_.want & kTempered)
#pragma unroll
        for (float z : c.z) sums.exp_tempered += exp2_approx((z - ref_) * tempered_log2e_);
    }
    if (p_.want & kSum) {
      float weight[W];
      weights(c.first, weight);
#pragma unroll
      for (int k = 0; k < W; ++k) sums.z += weight[k] * (c.z[k] - ref_);
    }
    if (p_.want & kSumSq)
#pragma unroll
      for (float z : c.z) sums.z_square += (z - ref_) * (z - ref_);
    if (p_.prob) {
      float q[W];
      probabilities(c.first, q);
#pragma unroll
      for (int k = 0; k < W; ++k) {
        sums.mass += q[k];
        sums.prob_z += q[k] * (c.z[k] - ref_);
      }
    }
  }

  template <int W> __device__ void differentiate(const Terms &t, const Columns<W> &c, bool own, float (&d)[W]) const {
#pragma unroll
    for (int k = 0; k < W; ++k) {
      const float x = c.z[k] - ref_, pi = exp2_approx(x * kLog2e) * t.inverse;
      d[k] = own ? t.own : pi * t.rest;
      if (t.want & kEntropy) d[k] += own || pi == 0 ? 0 : pi * t.rest_z * x;
    }
    if (t.want & kTempered)
#pragma unroll
      for (int k = 0; k < W; ++k)
        d[k] += own ? 0 : t.rest_t * exp2_approx((c.z[k] - ref_) * tempered_log2e_) * t.inverse_t;
    if (t.want & kSum) {
      float weight[W];
      weights(c.first, weight);
#pragma unroll
      for (int k = 0; k < W; ++k) d[k] += t.column * weight[k];
    }
    if (t.want & kSumSq)
#pragma unroll
      for (int k = 0; k < W; ++k) d[k] += t.linear * (c.z[k] - ref_);
    if (p_.prob) {
      float q[W];
      probabilities(c.first, q);
#pragma unroll
      for (int k = 0; k < W; ++k) d[k] += t.own * q[k];
    }
    if (t.want & kArgmax)
#pragma unroll
      for (int k = 0; k < W; ++k) d[k] += c.first + k == t.argmax ? t.arg : 0;
#pragma unroll
    for (int k = 0; k < W; ++k) {
      const float part = p_.softcap == 0 ? 0 : c.z[k] * inverse_cap_;
      d[k] *= (1 - part * part) * p_.scale;
    }
  }

  const RowStats &p_;
  int64_t row_;
  Target target_;
  uint4 *kept_;
  const T *logits_;
  Slice slice_;
  float single_, inner_, inverse_cap_, tempered_log2e_, ref_ = 0;
};

// E_p[z] - ref, the target included.
__device__ inline float mean_of(const Sums &sums, float logsum, float target_logit, float ref) {
  const float rest = sums.exp == 0 ? 0 : sums.exp_z / sums.exp;
  if (target_logit == -kInf) return rest;
  if (target_logit == kInf) return NAN; // as the softmax of such a row
  const float x = target_logit - ref, d = x - logsum;
  return rest / (1 + expf(d)) + x / (1 + expf(-d));
}

__device__ inline float inverse_of(float logsum) { return logsum == -kInf ? 0 : expf(-logsum); }

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    row_stats_general(const RowStats p, const int64_t first_row, const int slices, const bool keep) {
  SHARED_DYNAMIC(uint4, kept);
  SHARED_ARRAY(Peak, peaks, [kMaxWarps]);
  SHARED_ARRAY(Sums, parts, [kMaxWarps]);
  if (p.mode == kGradient && already_there(p)) return;
  const int rank = blockIdx.x % slices;
  const int64_t row = first_row + blockIdx.x / slices;
  const Target target = target_of(p, row);
  if (target.ignored) return ignore_row<T>(p, row, slices, rank); // the whole cluster leaves

  GeneralRow<T> r(p, row, target, slices, rank, keep ? kept : nullptr);
  typename GeneralRow<T>::Terms t{};
  if (p.mode == kGradient) {
    auto coef = [&](int k) { return p.row[k * p.n + row]; };
    auto stat = [&](int k) { return p.stats[k * p.n + row]; };
    r.set_max(stat(kMax));
    t.own = coef(kOwn);
    t.rest = coef(kRest);
    t.rest_z = coef(kRestZ);
    t.column = coef(kColumn);
    t.linear = coef(kLinear);
    t.rest_t = coef(kRestT);
    t.arg = coef(kArg);
    t.inverse = inverse_of(stat(kLogSum));
    t.inverse_t = inverse_of(stat(kLogSumT));
    t.argmax = p.want & kArgmax ? int(p.argmax[row]) : -1;
    t.want = p.want;
    if (p.target && target.column < 0) t.rest = NAN;
  } else {
    r.load();
    const Peak peak = merge_blocks(r.peak(), Peak{-kInf, -kInf, int(p.v)}, peaks, slices);
    r.set_max(peak.max);
    const Sums sums = merge_blocks(r.sums(), Sums{}, parts, slices);
    if (slices > 1)
      cluster_arrive_relaxed(); // no block leaves while another still reads its part: the wait is at the end

    const float logsum = logf(sums.exp), logit = r.target_logit();
    if (rank == 0 && threadIdx.x == 0) {
      auto write = [&](int k, bool wanted, float x) { p.stats[k * p.n + row] = wanted ? x : 0; };
      write(kMax, true, with_nan(peak.max, logsum));
      write(kLogSum, true, logsum);
      write(kTarget, true, p.prob ? sums.prob_z : logit);
      write(kMean, p.want & kEntropy, mean_of(sums, logsum, target.column < 0 ? -kInf : logit, r.ref()));
      write(kSumRow, p.want & kSum, sums.z);
      write(kSumSqRow, p.want & kSumSq, sums.z_square);
      write(kLogSumT, p.want & kTempered, logf(sums.exp_tempered));
      write(kMass, p.prob, sums.mass);
      if (p.want & kArgmax) p.argmax[row] = peak.at < p.v ? peak.at : 0; // nothing above -inf: the first column
    }
    if (p.mode == kBoth) {
      t.want = p.want & kSum;
      t.column = p.row[kSumWeight * p.n + row];
      t.inverse = sums.exp == 0 ? 0 : 1 / sums.exp;
      if (p.target) {
        const CrossEntropy c = hard_coefficients(p, row, peak.max, logsum, logit);
        t.own = c.own;
        t.rest = c.rest;
      } else {
        const float lse = peak.max + logsum;
        t.own = -p.row[kNll * p.n + row];
        t.rest = p.row[kNll * p.n + row] * sums.mass + p.row[kLse * p.n + row] + 2 * p.row[kLseSq * p.n + row] * lse;
      }
    }
  }
  if (p.mode != kStats) r.write_gradient(t);
  if (p.mode != kGradient && slices > 1) cluster_wait();
}

} // namespace fastloss
