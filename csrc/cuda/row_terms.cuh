// What the passes of row_terms compute of a column: shares, log-probabilities, and the terms of docs/design.md, "The
// terms contract". Flags and terms are known at run time: branches on them stand around groups of columns.
#pragma once
#include "row_terms_columns.cuh"

namespace fastloss {

// e^x scaled by an inverse sum, 0 (not 0 * inf) where there is no sum.
__device__ inline float share(float gap, float warmth, float scale) {
  return scale == 0 ? 0 : exp2_approx(gap * warmth) * scale;
}
__device__ inline float product(float weight, float x) { return weight == 0 ? 0 : weight * x; }
__device__ inline float finite_or_0(float max) { return max == -kInf ? 0 : max; }
__device__ inline float stable_softplus(float x) { return fmaxf(x, 0) + log1pf(expf(-fabsf(x))); }
__device__ inline float stable_sigmoid(float x) { return 1 / (1 + expf(-x)); }

// Of log cosh and binary cross entropy a and b are scores over the temperature, not log-probabilities.
__host__ __device__ constexpr bool is_raw(int term) { return term >= kLogCosh; }

// Whether the sum of e^(t / T) is part of what was asked for.
__device__ inline bool uses_teacher_sum(const RowTerms &p) {
  return !p.value && (p.want & (kTeacher | kScoreMean) || (p.want & kTerm && !is_raw(p.term)));
}

// Everything about a row that its passes share; `gap` is z - all_ref, `teacher_gap` t - teacher_ref.
struct TermRow {
  float cool, warmth;                                       // 1 / T, log2(e) / T
  float rest_ref, all_ref, teacher_ref, subset_ref;         // maxima, 0 for -inf
  float rest_scale, all_scale, teacher_scale, subset_scale; // what makes exponentials of them probabilities
  float all_logsum, teacher_logsum;
  float value, edge_scale; // HL-Gauss: v clamped, 1 / (sigma sqrt 2); teacher_scale is then 1 / (2 mass)

  __device__ TermRow(const RowTerms &p, int64_t row) : TermRow() {
    const float temperature = p.temperature ? p.temperature[row] : 1.f;
    cool = 1 / temperature;
    warmth = kLog2e / temperature;
    if (!p.value) return;
    const float high = p.a + p.b * float(p.v);
    value = fminf(fmaxf(p.value[row], p.a), high);
    edge_scale = 0.707106781f / p.c;
    const float mass = erff((high - value) * edge_scale) - erff((p.a - value) * edge_scale);
    teacher_scale = 1 / mass;
    teacher_logsum = logf(mass / 2);
  }

  // Softmax at T and softmax of the rest are then made of the same exponentials.
  __device__ bool rest_as_all() const { return warmth == kLog2e && rest_ref == all_ref; }

  // What to add to a term of log-probabilities: NaN where a row, or the teacher's, has none, all its scores being -inf.
  __device__ float undefined(const RowTerms &p) const {
    return is_raw(p.term) || (all_scale != 0 && teacher_scale != 0) ? 0 : NAN;
  }

  template <int W> __device__ void gaps(const TermColumns<W> &c, float (&gap)[W], float (&teacher_gap)[W]) const {
#pragma unroll
    for (int k = 0; k < W; ++k) gap[k] = c.z[k] - all_ref, teacher_gap[k] = c.t[k] - teacher_ref;
  }

  // q_j, of the teacher's scores or generated. 1 - erf keeps its digits on the far side of the mean.
  __device__ float teacher_share(const RowTerms &p, int column, float teacher_gap) const {
    if (!p.value) return share(teacher_gap, warmth, teacher_scale);
    const float left = (p.a + p.b * float(column) - value) * edge_scale;
    const float right = (p.a + p.b * float(column + 1) - value) * edge_scale;
    return (left > 0 ? erfcf(left) - erfcf(right) : erfcf(-right) - erfcf(-left)) * teacher_scale;
  }

private:
  TermRow() = default;
};

// f, f_a and f_b of one column; a factor of 0 adds 0, whatever it stands before.
struct TermValue {
  float f, f_a, f_b;
};

template <int TERM>
__device__ inline TermValue term_value(const RowTerms &p, float a, float b, float prob, float q, float t) {
  if constexpr (TERM == kKl) {
    const float u = a - b, qu = product(q, u), pu = product(prob, u);
    return {product(p.a, prob - q - qu) + product(p.b, q - prob + pu), product(p.b, pu + prob) - p.a * q,
            product(p.a, q - qu) - p.b * prob};
  } else if constexpr (TERM == kMixture) {
    const float m = p.c * q + (1 - p.c) * prob;
    if (m == 0) return {0, 0, 0};
    const float log_m = logf(m), pull = (p.a * q + p.b * prob) / m;
    const float q_part = product(q, b - log_m), p_part = product(prob, a - log_m);
    return {p.a * (m - q + q_part) + p.b * (m - prob + p_part), p.b * (p_part + prob) - pull * (1 - p.c) * prob,
            p.a * (q_part + q) - pull * p.c * q};
  } else if constexpr (TERM == kTotalVariation) {
    const float half = prob > q ? 0.5f : prob < q ? -0.5f : prob - q; // 0, or NaN
    return {fabsf(prob - q) / 2, half * prob, -half * q};
  } else if constexpr (TERM == kLogCosh) {
    const float x = fabsf(a - b) / 2, slope = copysignf(tanhf(x), a - b) / 2;
    // near 0 the logarithm of 1 + e^-2x loses x^2 / 2
    const float value = x < 0.03f ? x * x * (0.5f - x * x / 12) : x + log1pf(expf(-2 * x)) - kLn2;
    return {value, slope, -slope};
  } else {
    const float target = TERM == kBceLogits ? stable_sigmoid(b) : t;
    return {stable_softplus(a) - product(target, a), stable_sigmoid(a) - target, 0};
  }
}

// f(k, value) for the columns of a group, each by the term asked for.
template <int TERM, int W, class F>
__device__ void each_value_of(const RowTerms &p, const TermRow &r, const TermColumns<W> &c, const float (&prob)[W],
                              F f) {
  constexpr bool raw = is_raw(TERM);
#pragma unroll
  for (int k = 0; k < W; ++k) {
    const float teacher_gap = c.t[k] - r.teacher_ref, q = raw ? 0 : r.teacher_share(p, c.first + k, teacher_gap);
    const float a = raw ? c.z[k] * r.cool : (c.z[k] - r.all_ref) * r.cool - r.all_logsum;
    const float b = raw ? c.t[k] * r.cool : p.value ? logf(q) : teacher_gap * r.cool - r.teacher_logsum;
    f(k, term_value<TERM>(p, a, b, prob[k], q, c.t[k]));
  }
}

template <int W, class F>
__device__ void each_value(const RowTerms &p, const TermRow &r, const TermColumns<W> &c, const float (&prob)[W], F f) {
  switch (p.term) {
  case kKl:
    return each_value_of<kKl>(p, r, c, prob, f);
  case kMixture:
    return each_value_of<kMixture>(p, r, c, prob, f);
  case kTotalVariation:
    return each_value_of<kTotalVariation>(p, r, c, prob, f);
  case kLogCosh:
    return each_value_of<kLogCosh>(p, r, c, prob, f);
  case kBceLogits:
    return each_value_of<kBceLogits>(p, r, c, prob, f);
  default:
    return each_value_of<kBce>(p, r, c, prob, f);
  }
}

} // namespace fastloss
