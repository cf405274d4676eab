// The statistics of row_terms: a pass for the maxima, one for sums of exponentials, one for what needs probabilities.
#pragma once
#include "row_terms.cuh"

namespace fastloss {

struct Maxima {
  float rest, best, teacher, subset;
  int at;
};

__device__ inline Maxima merge(const Maxima &a, const Maxima &b) {
  const bool first = a.best > b.best || (a.best == b.best && a.at < b.at);
  return {fmaxf(a.rest, b.rest), first ? a.best : b.best, fmaxf(a.teacher, b.teacher), fmaxf(a.subset, b.subset),
          first ? a.at : b.at};
}

struct Exponentials {
  float rest, all, teacher, subset, z, z_square;
};

__device__ inline Exponentials merge(const Exponentials &a, const Exponentials &b) {
  return {a.rest + b.rest,     a.all + b.all, a.teacher + b.teacher,
          a.subset + b.subset, a.z + b.z,     a.z_square + b.z_square};
}

struct Means {
  float mean, teacher, score, own, term, slope, teacher_slope;
};

__device__ inline Means merge(const Means &a, const Means &b) {
  return {a.mean + b.mean,
          a.teacher + b.teacher,
          a.score + b.score,
          a.own + b.own,
          a.term + b.term,
          a.slope + b.slope,
          a.teacher_slope + b.teacher_slope};
}

template <class R> __device__ Maxima maxima(const RowTerms &p, const R &columns) {
  Maxima m{-kInf, -kInf, -kInf, -kInf, int(p.v)};
  columns.each([&](const auto &c) {
    constexpr int W = kColumns<std::decay_t<decltype(c)>>;
    float top = -kInf;
#pragma unroll
    for (int k = 0; k < W; ++k) top = fmaxf(top, c.z[k]);
    if (!c.listed) m.rest = fmaxf(m.rest, top);
    else
#pragma unroll
      for (int k = 0; k < W; ++k) m.rest = c.listed >> k & 1 ? m.rest : fmaxf(m.rest, c.z[k]);
    if (p.want & kArgmax && (top > m.best || (top == m.best && c.first < m.at))) {
      m.at = c.first;
#pragma unroll
      for (int k = W - 1; k >= 0; --k) m.at = c.z[k] == top ? c.first + k : m.at;
    }
    m.best = fmaxf(m.best, top);
#pragma unroll
    for (int k = 0; k < W; ++k) m.teacher = fmaxf(m.teacher, c.t[k]);
    if (p.want & kSubset)
#pragma unroll
      for (int k = 0; k < W; ++k) m.subset = p.subset[c.first + k] ? fmaxf(m.subset, c.z[k]) : m.subset;
  });
  return m;
}

template <class R> __device__ Exponentials exponentials(const RowTerms &p, const TermRow &r, const R &columns) {
  Exponentials e{};
  const bool teacher = uses_teacher_sum(p), rest_as_all = r.rest_as_all();
  columns.each([&](const auto &c) {
    constexpr int W = kColumns<std::decay_t<decltype(c)>>;
    float gap[W], power[W];
#pragma unroll
    for (int k = 0; k < W; ++k) {
      gap[k] = c.z[k] - r.all_ref;
      power[k] = exp2_approx(gap[k] * r.warmth);
      e.all += power[k];
    }
    if (!rest_as_all)
#pragma unroll
      for (int k = 0; k < W; ++k) power[k] = exp2_approx((c.z[k] - r.rest_ref) * kLog2e);
#pragma unroll
    for (int k = 0; k < W; ++k) e.rest += c.listed >> k & 1 ? 0 : power[k];
    if (teacher)
#pragma unroll
      for (int k = 0; k < W; ++k) e.teacher += exp2_approx((c.t[k] - r.teacher_ref) * r.warmth);
    if (p.want & kSubset)
#pragma unroll
      for (int k = 0; k < W; ++k) e.subset += p.subset[c.first + k] ? exp2_approx((c.z[k] - r.subset_ref) * kLog2e) : 0;
    if (p.want & kSum)
#pragma unroll
      for (float x : gap) e.z += x;
    if (p.want & kSumSq)
#pragma unroll
      for (float x : gap) e.z_square += x * x;
  });
  return e;
}

template <class R> __device__ Means means(const RowTerms &p, const TermRow &r, const R &columns) {
  Means m{};
  columns.each([&](const auto &c) {
    constexpr int W = kColumns<std::decay_t<decltype(c)>>;
    float gap[W], teacher_gap[W], prob[W];
    r.gaps(c, gap, teacher_gap);
#pragma unroll
    for (int k = 0; k < W; ++k) prob[k] = share(gap[k], r.warmth, r.all_scale);
    if (p.want & kEntropy)
#pragma unroll
      for (int k = 0; k < W; ++k) m.mean += product(prob[k], gap[k]);
    if (p.want & kTeacherMean)
#pragma unroll
      for (int k = 0; k < W; ++k) m.teacher += product(prob[k], teacher_gap[k]);
    if (p.want & kScoreMean)
#pragma unroll
      for (int k = 0; k < W; ++k) {
        const float q = r.teacher_share(p, c.first + k, teacher_gap[k]);
        m.score += product(q, gap[k]);
        m.own += product(q, teacher_gap[k]);
      }
    if (p.want & kTerm)
      each_value(p, r, c, prob, [&](int, const TermValue &x) {
        m.term += x.f;
        m.slope += x.f_a;
        m.teacher_slope += x.f_b;
      });
  });
  return m;
}

// The scores of the listed columns: -inf where there is none, NaN where there is no such column.
template <class T> __device__ void write_listed(const RowTerms &p, int64_t row) {
  const T *logits = static_cast<const T *>(p.logits) + row * p.ld;
  for (int k = threadIdx.x; k < p.k; k += blockDim.x) {
    const int64_t id = p.listed[row * p.k + k];
    const bool absent = id < 0 || id == p.ignore_index;
    const float z = absent ? -kInf : id >= p.v ? NAN : score_of(p, to_float(logits[id]));
    p.stats[(kListedScores + k) * p.n + row] = z;
  }
}

template <class T>
__global__ void __launch_bounds__(kTermThreads, 3)
    row_terms_statistics(const RowTerms p, const int64_t first_row, const int slices, const bool keep) {
  SHARED_DYNAMIC(int, listed);
  SHARED_ARRAY(Maxima, peaks, [kTermWarps]);
  SHARED_ARRAY(Exponentials, sums, [kTermWarps]);
  SHARED_ARRAY(Means, parts, [kTermWarps]);
  const int rank = blockIdx.x % slices;
  const int64_t row = first_row + blockIdx.x / slices;
  auto write = [&](int which, float x) { p.stats[which * p.n + row] = x; };
  if (is_ignored(p, row)) { // the whole cluster leaves
    if (rank) return;
    for (int i = threadIdx.x; i < kListedScores + p.k; i += blockDim.x) write(i, 0);
    if (threadIdx.x == 0 && p.want & kArgmax) p.argmax[row] = -1;
    return;
  }
  const TermColumnsOfRow<T> columns(p, row, listed, slices, rank, keep ? after_ids(listed, p.k) : nullptr);
  columns.load();
  read_listed(p, row, listed);
  TermRow r(p, row);
  const Maxima m = merge_blocks(maxima(p, columns), Maxima{-kInf, -kInf, -kInf, -kInf, int(p.v)}, peaks, slices);
  r.rest_ref = finite_or_0(m.rest);
  r.all_ref = finite_or_0(m.best);
  r.teacher_ref = p.value ? 0 : finite_or_0(m.teacher);
  r.subset_ref = finite_or_0(m.subset);
  const Exponentials e = merge_blocks(exponentials(p, r, columns), Exponentials{}, sums, slices);
  const bool teacher = uses_teacher_sum(p), subset = p.want & kSubset;
  r.all_logsum = logf(e.all);
  r.all_scale = e.all == 0 ? 0 : 1 / e.all;
  if (teacher) {
    r.teacher_logsum = logf(e.teacher);
    r.teacher_scale = e.teacher == 0 ? 0 : 1 / e.teacher;
  }
  const bool writes = rank == 0 && threadIdx.x == 0;
  if (writes) { // at once: across the last pass they would cost registers
    const float rest_logsum = logf(e.rest), subset_logsum = subset ? logf(e.subset) : 0;
    const float teacher_max = teacher ? with_nan(m.teacher, r.teacher_logsum) : m.teacher;
    write(kRestMax, with_nan(m.rest, rest_logsum));
    write(kRestLogSum, rest_logsum);
    write(kAllMax, with_nan(m.best, r.all_logsum));
    write(kAllLogSum, r.all_logsum);
    write(kAllSum, e.z);
    write(kAllSumSq, e.z_square);
    write(kTeacherMax, teacher || (p.want & kTeacherMean && !p.value) ? teacher_max : 0);
    write(kTeacherLogSum, r.teacher_logsum);
    write(kSubsetMax, subset ? with_nan(m.subset, subset_logsum) : 0);
    write(kSubsetLogSum, subset_logsum);
    if (p.want & kArgmax) p.argmax[row] = m.at < p.v ? m.at : 0; // no column above -inf, or NaN alone: the first
  }
  if (rank == 0) write_listed<T>(p, row);
  Means all{};
  if (p.want & (kEntropy | kTeacherMean | kScoreMean | kTerm))
    all = merge_blocks(means(p, r, columns), Means{}, parts, slices);
  if (slices > 1) cluster_arrive_relaxed(); // no block leaves while another still reads its part
  if (writes) {
    const bool slopes = p.want & kTerm && !is_raw(p.term);
    write(kAllMean, all.mean);
    write(kTeacherMeanRow, all.teacher);
    write(kScoreMeanRow, all.score);
    write(kTeacherOwnMean, all.own);
    write(kTermRow, p.want & kTerm ? all.term + r.undefined(p) : 0);
    write(kSlope, slopes ? all.slope : 0);
    write(kTeacherSlope, slopes ? all.teacher_slope : 0);
  }
  if (slices > 1) cluster_wait();
}

} // namespace fastloss
