// row_terms on a GPU: the kernels and their launcher.
#include "row_terms.cuh"

#include "cuda.h"

#include <algorithm>

namespace fastloss {
namespace {

struct Maxima {
  float rest, best, teacher, subset;
  int at;
};

__device__ Maxima merge(const Maxima &a, const Maxima &b) {
  const bool first = a.best > b.best || (a.best == b.best && a.at < b.at);
  return {fmaxf(a.rest, b.rest), first ? a.best : b.best, fmaxf(a.teacher, b.teacher), fmaxf(a.subset, b.subset),
          first ? a.at : b.at};
}

struct Exponentials {
  float rest, all, teacher, subset, z, z_square;
};

__device__ Exponentials merge(const Exponentials &a, const Exponentials &b) {
  return {a.rest + b.rest,     a.all + b.all, a.teacher + b.teacher,
          a.subset + b.subset, a.z + b.z,     a.z_square + b.z_square};
}

struct Means {
  float mean, teacher, score, own, term, slope, teacher_slope;
};

__device__ Means merge(const Means &a, const Means &b) {
  return {a.mean + b.mean,
          a.teacher + b.teacher,
          a.score + b.score,
          a.own + b.own,
          a.term + b.term,
          a.slope + b.slope,
          a.teacher_slope + b.teacher_slope};
}

__device__ bool uses_teacher_sum(const RowTerms &p) {
  return !p.value && (p.want & (kTeacher | kScoreMean) || (p.want & kTerm && !is_raw(p.term)));
}

template <class T> __device__ Maxima maxima(const RowTerms &p, const TermRow &r, int64_t row) {
  Maxima m{-kInf, -kInf, -kInf, -kInf, int(p.v)};
  each_group<T>(p, r, row, [&](const auto &c) {
    constexpr int W = sizeof(c.z) / sizeof(float);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      if (!(c.listed >> k & 1)) m.rest = fmaxf(m.rest, c.z[k]);
      if (c.z[k] > m.best) m.best = c.z[k], m.at = c.first + k;
      m.teacher = fmaxf(m.teacher, c.t[k]);
      if (p.want & kSubset && p.subset[c.first + k]) m.subset = fmaxf(m.subset, c.z[k]);
    }
  });
  return m;
}

template <class T> __device__ Exponentials exponentials(const RowTerms &p, const TermRow &r, int64_t row) {
  Exponentials e{};
  const bool teacher = uses_teacher_sum(p);
  each_group<T>(p, r, row, [&](const auto &c) {
    constexpr int W = sizeof(c.z) / sizeof(float);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      const float gap = c.z[k] - r.all_ref;
      if (!(c.listed >> k & 1)) e.rest += exp2_approx((c.z[k] - r.rest_ref) * kLog2e);
      e.all += exp2_approx(gap * r.warmth);
      if (teacher) e.teacher += exp2_approx((c.t[k] - r.teacher_ref) * r.warmth);
      if (p.want & kSubset && p.subset[c.first + k]) e.subset += exp2_approx((c.z[k] - r.subset_ref) * kLog2e);
      if (p.want & kSum) e.z += gap;
      if (p.want & kSumSq) e.z_square += gap * gap;
    }
  });
  return e;
}

template <class T> __device__ Means means(const RowTerms &p, const TermRow &r, int64_t row) {
  Means m{};
  each_group<T>(p, r, row, [&](const auto &c) {
    constexpr int W = sizeof(c.z) / sizeof(float);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      const float gap = c.z[k] - r.all_ref, teacher_gap = c.t[k] - r.teacher_ref;
      const float prob = share(gap, r.warmth, r.all_scale);
      if (p.want & kEntropy) m.mean += product(prob, gap);
      if (p.want & kTeacherMean) m.teacher += product(prob, teacher_gap);
      const float q = p.want & (kScoreMean | kTerm) ? teacher_share(p, r, teacher_gap, c.first + k) : 0;
      if (p.want & kScoreMean) {
        m.score += product(q, gap);
        if (!p.value) m.own += product(q, teacher_gap);
      }
      if (!(p.want & kTerm)) continue;
      const bool raw = is_raw(p.term);
      const float a = raw ? c.z[k] / r.temperature : gap / r.temperature - r.all_logsum;
      const float b = raw ? c.t[k] / r.temperature : teacher_gap / r.temperature - r.teacher_logsum;
      const TermValue v = term_value(p, a, b, prob, q, c.t[k]);
      m.term += v.f;
      if (!raw) m.slope += v.f_a, m.teacher_slope += v.f_b;
    }
  });
  return m;
}

template <class T>
__global__ void __launch_bounds__(kTermThreads) row_terms_statistics(const RowTerms p, const int64_t first_row) {
  SHARED_DYNAMIC(int, listed);
  SHARED_ARRAY(Maxima, peaks, [kTermWarps]);
  SHARED_ARRAY(Exponentials, sums, [kTermWarps]);
  SHARED_ARRAY(Means, parts, [kTermWarps]);
  const int64_t row = first_row + blockIdx.x;
  auto write = [&](int which, float x) { p.stats[which * p.n + row] = x; };
  if (is_ignored(p, row)) {
    for (int i = threadIdx.x; i < kListedScores + p.k; i += blockDim.x) write(i, 0);
    if (threadIdx.x == 0 && p.want & kArgmax) p.argmax[row] = -1;
    return;
  }
  read_listed(p, row, listed);
  TermRow r = term_row(p, row, listed);
  const Maxima m = merge_blocks(maxima<T>(p, r, row), Maxima{-kInf, -kInf, -kInf, -kInf, int(p.v)}, peaks, 1);
  r.rest_ref = finite_or_0(m.rest);
  r.all_ref = finite_or_0(m.best);
  r.teacher_ref = p.value ? 0 : finite_or_0(m.teacher);
  r.subset_ref = finite_or_0(m.subset);
  const Exponentials e = merge_blocks(exponentials<T>(p, r, row), Exponentials{}, sums, 1);
  const bool teacher = uses_teacher_sum(p);
  r.all_logsum = logf(e.all);
  r.all_scale = e.all == 0 ? 0 : 1 / e.all;
  if (teacher) {
    r.teacher_logsum = logf(e.teacher);
    r.teacher_scale = e.teacher == 0 ? 0 : 1 / e.teacher;
  }
  Means all{};
  if (p.want & (kEntropy | kTeacherMean | kScoreMean | kTerm))
    all = merge_blocks(means<T>(p, r, row), Means{}, parts, 1);
  for (int k = threadIdx.x; k < p.k; k += blockDim.x) {
    const int64_t id = p.listed[row * p.k + k];
    const bool absent = id < 0 || id == p.ignore_index;
    const float z = absent      ? -kInf
                    : id >= p.v ? NAN
                                : score_of(p, to_float(static_cast<const T *>(p.logits)[row * p.ld + id]));
    write(kListedScores + k, z);
  }
  if (threadIdx.x) return;
  const bool subset = p.want & kSubset;
  const float rest_logsum = logf(e.rest), subset_logsum = subset ? logf(e.subset) : 0;
  const bool teacher_max = !p.value && (teacher || p.want & kTeacherMean);
  write(kRestMax, with_nan(m.rest, rest_logsum));
  write(kRestLogSum, rest_logsum);
  write(kAllMax, with_nan(m.best, r.all_logsum));
  write(kAllLogSum, r.all_logsum);
  write(kAllMean, all.mean);
  write(kAllSum, e.z);
  write(kAllSumSq, e.z_square);
  write(kTeacherMax, teacher_max ? teacher ? with_nan(m.teacher, r.teacher_logsum) : m.teacher : 0);
  write(kTeacherLogSum, r.teacher_logsum);
  write(kTeacherMeanRow, all.teacher);
  write(kScoreMeanRow, all.score);
  write(kTeacherOwnMean, all.own);
  write(kTermRow, all.term);
  write(kSlope, all.slope);
  write(kTeacherSlope, all.teacher_slope);
  write(kSubsetMax, subset ? with_nan(m.subset, subset_logsum) : 0);
  write(kSubsetLogSum, subset_logsum);
  if (p.want & kArgmax) p.argmax[row] = m.at < p.v ? m.at : 0; // nothing above -inf: the first column
}

template <class T, int W> __device__ void store_group(T *to, const float (&x)[W]) {
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

template <class T>
__global__ void __launch_bounds__(kTermThreads) row_terms_gradient(const RowTerms p, const int64_t first_row) {
  SHARED_DYNAMIC(int, listed);
  const int64_t row = first_row + blockIdx.x;
  T *out = static_cast<T *>(p.dlogits) + row * p.ld_out;
  if (is_ignored(p, row)) {
    for (int64_t j = threadIdx.x; j < p.v; j += blockDim.x) store(out[j], 0);
    return;
  }
  const bool bad = read_listed(p, row, listed);
  TermRow r = term_row(p, row, listed);
  auto stat = [&](int which) { return p.stats[which * p.n + row]; };
  auto coef = [&](int which) { return p.coef[which * p.n + row]; };
  auto scale_of = [&](float logsum) { return logsum == -kInf ? 0 : expf(-logsum); };
  r.rest_ref = finite_or_0(stat(kRestMax));
  r.rest_scale = scale_of(stat(kRestLogSum));
  r.all_ref = finite_or_0(stat(kAllMax));
  r.all_logsum = stat(kAllLogSum);
  r.all_scale = scale_of(r.all_logsum);
  r.teacher_ref = finite_or_0(stat(kTeacherMax));
  if (!p.value) r.teacher_logsum = stat(kTeacherLogSum);
  r.teacher_scale = uses_teacher_sum(p) ? scale_of(r.teacher_logsum) : 0;
  r.subset_ref = finite_or_0(stat(kSubsetMax));
  r.subset_scale = p.want & kSubset ? scale_of(stat(kSubsetLogSum)) : 0;
  const float rest = bad ? NAN : coef(kCoefRest), total = coef(kCoefAll),
              all_z = p.want & kEntropy ? coef(kCoefAllZ) : 0;
  const float all_t = p.want & kTeacherMean ? coef(kCoefAllT) : 0,
              teacher = p.want & kScoreMean ? coef(kCoefTeacher) : 0;
  const float term = p.want & kTerm ? coef(kCoefTerm) : 0, subset = p.want & kSubset ? coef(kCoefSubset) : 0;
  const float column = p.want & kSum ? coef(kCoefColumn) : 0, linear = p.want & kSumSq ? coef(kCoefLinear) : 0;
  const float arg = p.want & kArgmax ? coef(kCoefArg) : 0;
  const int best = p.want & kArgmax ? int(p.argmax[row]) : -1;
  each_group<T>(p, r, row, [&](const auto &c) {
    constexpr int W = sizeof(c.z) / sizeof(float);
    float d[W];
#pragma unroll
    for (int k = 0; k < W; ++k) {
      const float gap = c.z[k] - r.all_ref, teacher_gap = c.t[k] - r.teacher_ref;
      const float prob = share(gap, r.warmth, r.all_scale);
      const float pi = c.listed >> k & 1 ? 0 : share(c.z[k] - r.rest_ref, kLog2e, r.rest_scale);
      d[k] = bad ? NAN : product(pi, rest) + product(prob, total + product(all_z, gap) + product(all_t, teacher_gap));
      const float q = p.want & (kScoreMean | kTerm) ? teacher_share(p, r, teacher_gap, c.first + k) : 0;
      d[k] += product(q, teacher);
      if (term != 0) {
        const bool raw = is_raw(p.term);
        const float a = raw ? c.z[k] / r.temperature : gap / r.temperature - r.all_logsum;
        const float b = raw ? c.t[k] / r.temperature : teacher_gap / r.temperature - r.teacher_logsum;
        d[k] += term * term_value(p, a, b, prob, q, c.t[k]).f_a;
      }
      if (subset != 0 && p.subset[c.first + k]) d[k] += subset * share(c.z[k] - r.subset_ref, kLog2e, r.subset_scale);
      d[k] += column + product(linear, gap) + (c.first + k == best ? arg : 0);
    }
    if (c.listed)
#pragma unroll 1
      for (int i = 0; i < r.k; ++i) {
#pragma unroll
        for (int k = 0; k < W; ++k) d[k] += r.listed[i] == c.first + k ? coef(kCoefListed + i) : 0;
      }
#pragma unroll
    for (int k = 0; k < W; ++k) {
      const float part = p.softcap == 0 ? 0 : c.z[k] / p.softcap;
      d[k] *= (1 - part * part) * p.scale;
    }
    store_group(out + c.first, d);
  });
}

template <class T> void launch_terms(const RowTerms &p, int64_t first, int64_t rows, void *stream) {
  Launch l;
  l.grid = dim3(unsigned(rows));
  l.block = dim3(kTermThreads);
  l.smem = size_t(p.k) * sizeof(int);
  l.stream = static_cast<decltype(l.stream)>(stream);
  launch(l, p.mode == kGradient ? row_terms_gradient<T> : row_terms_statistics<T>, p, first);
}

} // namespace

const char *row_terms_cuda_why_not(const RowTerms &p) {
  if (p.v >= int64_t(1) << 31) return "the CUDA kernel counts columns with 32 bits: V must be below 2^31";
  if (p.k > 8192) return "the CUDA kernel takes at most 8192 listed columns a row";
  return nullptr;
}

void row_terms_cuda(const RowTerms &p, int device, void *stream) {
  if (const char *reason = row_terms_cuda_why_not(p)) throw std::runtime_error(reason);
  const DeviceGuard guard(device);
  const auto launch_some = p.dtype == kFloat32   ? launch_terms<float>
                           : p.dtype == kFloat16 ? launch_terms<__half>
                                                 : launch_terms<__nv_bfloat16>;
  for (int64_t first = 0; first < p.n; first += INT32_MAX)
    launch_some(p, first, std::min<int64_t>(p.n - first, INT32_MAX), stream);
}

} // namespace fastloss
