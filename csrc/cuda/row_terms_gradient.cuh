// The gradient of row_terms, one pass; every block of a row works alone.
#pragma once
#include "row_terms.cuh"

namespace fastloss {

template <class T, int W> __device__ void store_columns(T *to, const float (&x)[W]) {
  if constexpr (W == 1) {
    store(*to, x[0]);
  } else {
    constexpr int N = kWidth<T>;
    const bool aligned = is_aligned(to);
#pragma unroll
    for (int v = 0; v < W; v += N) {
      float part[N];
#pragma unroll
      for (int k = 0; k < N; ++k) part[k] = x[v + k];
      put(to + v, aligned, part);
    }
  }
}

// The coefficients of a row; what was not asked for is 0.
struct TermCoefficients {
  float rest, all, all_z, all_t, teacher, term, subset, column, linear, arg;

  __device__ TermCoefficients(const RowTerms &p, int64_t row) {
    auto read = [&](int which, bool wanted) { return wanted ? p.coef[which * p.n + row] : 0; };
    rest = read(kCoefRest, true);
    all = read(kCoefAll, true);
    all_z = read(kCoefAllZ, p.want & kEntropy);
    all_t = read(kCoefAllT, p.want & kTeacherMean);
    teacher = read(kCoefTeacher, p.want & kScoreMean);
    term = read(kCoefTerm, p.want & kTerm);
    subset = read(kCoefSubset, p.want & kSubset);
    column = read(kCoefColumn, p.want & kSum);
    linear = read(kCoefLinear, p.want & kSumSq);
    arg = read(kCoefArg, p.want & kArgmax);
  }
};

// What the statistics say about a row.
__device__ inline TermRow row_of_statistics(const RowTerms &p, int64_t row) {
  TermRow r(p, row);
  auto stat = [&](int which) { return p.stats[which * p.n + row]; };
  r.rest_ref = finite_or_0(stat(kRestMax));
  r.rest_scale = inverse_of(stat(kRestLogSum));
  r.all_ref = finite_or_0(stat(kAllMax));
  r.all_logsum = stat(kAllLogSum);
  r.all_scale = inverse_of(r.all_logsum);
  r.teacher_ref = finite_or_0(stat(kTeacherMax));
  if (uses_teacher_sum(p)) {
    r.teacher_logsum = stat(kTeacherLogSum);
    r.teacher_scale = inverse_of(r.teacher_logsum);
  }
  r.subset_ref = finite_or_0(stat(kSubsetMax));
  r.subset_scale = p.want & kSubset ? inverse_of(stat(kSubsetLogSum)) : 0;
  return r;
}

template <class T>
__global__ void __launch_bounds__(kTermThreads, 3)
    row_terms_gradient(const RowTerms p, const int64_t first_row, const int slices, const bool keep) {
  SHARED_DYNAMIC(int, listed);
  const int rank = blockIdx.x % slices;
  const int64_t row = first_row + blockIdx.x / slices;
  T *out = static_cast<T *>(p.dlogits) + row * p.ld_out;
  if (is_ignored(p, row)) {
    for (int64_t j = rank * blockDim.x + threadIdx.x; j < p.v; j += slices * blockDim.x) store(out[j], 0);
    return;
  }
  const TermColumnsOfRow<T> columns(p, row, listed, slices, rank, keep ? after_ids(listed, p.k) : nullptr);
  columns.load();
  const bool bad = read_listed(p, row, listed);
  const TermRow r = row_of_statistics(p, row);
  TermCoefficients by(p, row);
  if (by.term != 0) by.term += r.undefined(p);
  const int best = p.want & kArgmax ? int(p.argmax[row]) : -1;
  const bool rest_as_all = r.rest_as_all();
  columns.each([&](const auto &c) {
    constexpr int W = kColumns<std::decay_t<decltype(c)>>;
    float gap[W], teacher_gap[W], prob[W], d[W];
    r.gaps(c, gap, teacher_gap);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      const float power = exp2_approx(gap[k] * r.warmth);
      prob[k] = r.all_scale == 0 ? 0 : power * r.all_scale;
      d[k] = by.column + product(by.all, prob[k]);
      if (by.rest != 0 && !(c.listed >> k & 1)) {
        const float rest = rest_as_all ? power : exp2_approx((c.z[k] - r.rest_ref) * kLog2e);
        d[k] += r.rest_scale == 0 ? 0 : rest * r.rest_scale * by.rest;
      }
    }
    if (by.all_z != 0)
#pragma unroll
      for (int k = 0; k < W; ++k) d[k] += product(prob[k], by.all_z * gap[k]);
    if (by.all_t != 0)
#pragma unroll
      for (int k = 0; k < W; ++k) d[k] += product(prob[k], by.all_t * teacher_gap[k]);
    if (by.teacher != 0)
#pragma unroll
      for (int k = 0; k < W; ++k) d[k] += by.teacher * r.teacher_share(p, c.first + k, teacher_gap[k]);
    if (by.term != 0) each_value(p, r, c, prob, [&](int k, const TermValue &x) { d[k] += by.term * x.f_a; });
    if (by.subset != 0)
#pragma unroll
      for (int k = 0; k < W; ++k)
        d[k] += p.subset[c.first + k] ? by.subset * share(c.z[k] - r.subset_ref, kLog2e, r.subset_scale) : 0;
    if (by.linear != 0)
#pragma unroll
      for (int k = 0; k < W; ++k) d[k] += by.linear * gap[k];
    if (p.want & kArgmax)
#pragma unroll
      for (int k = 0; k < W; ++k) d[k] += c.first + k == best ? by.arg : 0;
    if (c.listed)
#pragma unroll 1
      for (int i = 0; i < p.k; ++i) {
#pragma unroll
        for (int k = 0; k < W; ++k)
          if (listed[i] == c.first + k) d[k] += p.coef[(kCoefListed + i) * p.n + row];
      }
#pragma unroll
    for (int k = 0; k < W; ++k) {
      const float part = p.softcap == 0 ? 0 : c.z[k] / p.softcap;
      d[k] = bad ? NAN : d[k] * (1 - part * part) * p.scale;
    }
    store_columns(out + c.first, d);
  });
}

} // namespace fastloss
