// The terms contract of docs/design.md on a GPU: one block a row. Three passes for the statistics (maxima, sums of
// exponentials, what needs probabilities) and one for the gradient; after the first the row comes from L2. What was
// asked for is known at run time: branches stand around groups of columns.
#pragma once
#include "row_stats_general.cuh"
#include "row_terms.h"

namespace fastloss {

constexpr int kTermThreads = 256, kTermWarps = kTermThreads / 32, kGroup = 8;

// Everything about a row that its passes share; `gap` below is z - all_max, `teacher_gap` t - teacher_max.
struct TermRow {
  const int *listed; // in shared memory, the ids that are columns; the others are -1
  int k;
  float temperature, warmth;                                // T, log2(e) / T
  float rest_ref, all_ref, teacher_ref, subset_ref;         // maxima, 0 for -inf
  float rest_scale, all_scale, teacher_scale, subset_scale; // what makes exponentials of them probabilities
  float all_logsum, teacher_logsum;
  float value, edge_scale, gauss_scale; // HL-Gauss: v clamped, 1 / (sigma sqrt 2), 1 / (2 mass)
};

__device__ inline float score_of(const RowTerms &p, float logit) {
  return p.softcap == 0 ? logit * p.scale : p.softcap * tanhf(logit * p.scale / p.softcap);
}

template <int W> __device__ void load_any(const void *from, int dtype, int64_t at, float (&x)[W]) {
  if (dtype == kFloat32) load_values(static_cast<const float *>(from) + at, x);
  else if (dtype == kFloat16) load_values(static_cast<const __half *>(from) + at, x);
  else load_values(static_cast<const __nv_bfloat16 *>(from) + at, x);
}

// A group of columns: their scores, the teacher's, and which of them are listed.
template <int W> struct TermColumns {
  float z[W], t[W];
  int first;
  unsigned listed;
};

// f(columns) for all columns of this thread: groups of kGroup, then what is left one by one.
template <class T, class F> __device__ void each_group(const RowTerms &p, const TermRow &r, int64_t row, F f) {
  auto visit = [&](auto c) {
    constexpr int W = sizeof(c.z) / sizeof(float);
    load_values(static_cast<const T *>(p.logits) + row * p.ld + c.first, c.z);
#pragma unroll
    for (float &z : c.z) z = score_of(p, z);
    if (p.teacher) load_any(p.teacher, p.teacher_dtype, row * p.ld_teacher + c.first, c.t);
    c.listed = 0;
#pragma unroll 1
    for (int k = 0; k < r.k; ++k) {
      const unsigned at = unsigned(r.listed[k] - c.first);
      if (r.listed[k] >= 0 && at < unsigned(W)) c.listed |= 1u << at;
    }
    f(c);
  };
  const int whole = int(p.v) / kGroup * kGroup;
#pragma unroll 1
  for (int first = threadIdx.x * kGroup; first < whole; first += blockDim.x * kGroup)
    visit(TermColumns<kGroup>{{}, {}, first, 0});
  if (const int first = whole + int(threadIdx.x); first < p.v) visit(TermColumns<1>{{}, {}, first, 0});
}

__device__ inline float finite_or_0(float max) { return max == -kInf ? 0 : max; }
// e^x scaled by an inverse sum, 0 (not 0 * inf) where there is no sum.
__device__ inline float share(float gap, float warmth, float scale) {
  return scale == 0 ? 0 : exp2_approx(gap * warmth) * scale;
}
__device__ inline float product(float weight, float x) { return weight == 0 ? 0 : weight * x; }
__device__ inline float stable_softplus(float x) { return fmaxf(x, 0) + log1pf(expf(-fabsf(x))); }
__device__ inline float stable_sigmoid(float x) { return 1 / (1 + expf(-x)); }

// The probability of bin j of a Gaussian around the value: 1 - erf keeps its digits on the far side of the mean.
__device__ inline float gauss_probability(const RowTerms &p, const TermRow &r, int j) {
  const float left = (p.a + p.b * float(j) - r.value) * r.edge_scale;
  const float right = (p.a + p.b * float(j + 1) - r.value) * r.edge_scale;
  return (left > 0 ? erfcf(left) - erfcf(right) : erfcf(-right) - erfcf(-left)) * r.gauss_scale;
}

// f, f_a and f_b of one column (docs/design.md): log-probabilities a, b and probabilities q = e^b, prob = e^a; for the
// raw terms a = z / T, b = t / T.
struct TermValue {
  float f, f_a, f_b;
};

__device__ inline TermValue term_value(const RowTerms &p, float a, float b, float prob, float q, float t) {
  switch (p.term) {
  case kKl: {
    const float u = a - b, qu = product(q, u), pu = product(prob, u);
    return {p.a * (prob - q - qu) + p.b * (q - prob + pu), p.b * (pu + prob) - p.a * q, p.a * (q - qu) - p.b * prob};
  }
  case kMixture: {
    const float m = p.c * q + (1 - p.c) * prob;
    if (m == 0) return {0, 0, 0};
    const float log_m = logf(m), pull = (p.a * q + p.b * prob) / m;
    const float q_part = product(q, b - log_m), p_part = product(prob, a - log_m);
    return {p.a * (m - q + q_part) + p.b * (m - prob + p_part), p.b * (p_part + prob) - pull * (1 - p.c) * prob,
            p.a * (q_part + q) - pull * p.c * q};
  }
  case kTotalVariation: {
    const float half = prob > q ? 0.5f : prob < q ? -0.5f : 0.f;
    return {fabsf(prob - q) / 2, half * prob, -half * q};
  }
  case kLogCosh: {
    const float x = fabsf(a - b) / 2, slope = copysignf(tanhf(x), a - b) / 2;
    // near 0 the logarithm of 1 + e^-2x loses x^2 / 2
    const float value = x < 0.03f ? x * x * (0.5f - x * x / 12) : x + log1pf(expf(-2 * x)) - kLn2;
    return {value, slope, -slope};
  }
  default: {
    const float target = p.term == kBceLogits ? stable_sigmoid(b) : t;
    return {stable_softplus(a) - product(target, a), stable_sigmoid(a) - target, 0};
  }
  }
}

__device__ inline bool is_raw(int term) { return term >= kLogCosh; }

// q_j, whether from the teacher's scores or generated.
__device__ inline float teacher_share(const RowTerms &p, const TermRow &r, float teacher_gap, int j) {
  return p.value ? gauss_probability(p, r, j) : share(teacher_gap, r.warmth, r.teacher_scale);
}

// Ids to shared memory; returns whether one is out of range. Every thread calls it.
__device__ inline bool read_listed(const RowTerms &p, int64_t row, int *to) {
  bool bad = false;
  for (int k = threadIdx.x; k < p.k; k += blockDim.x) {
    const int64_t id = p.listed[row * p.k + k];
    const bool absent = id < 0 || id == p.ignore_index;
    bad |= !absent && id >= p.v;
    to[k] = absent || id >= p.v ? -1 : int(id);
  }
  return __syncthreads_or(bad);
}

__device__ inline bool is_ignored(const RowTerms &p, int64_t row) {
  return p.k > 0 && p.listed[row * p.k] == p.ignore_index;
}

__device__ inline TermRow term_row(const RowTerms &p, int64_t row, const int *listed) {
  TermRow r{};
  r.listed = listed;
  r.k = int(p.k);
  r.temperature = p.temperature ? p.temperature[row] : 1.f;
  r.warmth = kLog2e / r.temperature;
  if (p.value) {
    const float high = p.a + p.b * float(p.v);
    r.value = fminf(fmaxf(p.value[row], p.a), high);
    r.edge_scale = 0.707106781f / p.c;
    const float mass = erff((high - r.value) * r.edge_scale) - erff((p.a - r.value) * r.edge_scale);
    r.gauss_scale = 1 / mass;
    r.teacher_logsum = logf(mass / 2);
  }
  return r;
}

} // namespace fastloss
