// Logarithms in the words of simd.h. `split` takes a positive finite number apart: fraction * 2^exponent, the fraction
// in [sqrt(1/2), sqrt(2)), also where the number is subnormal. log_ratio(p, m, apart) is log(p / m), p and m positive
// and their ratio normal; apart = m - p has the digits that the subtraction would lose where they are near.
#pragma once
#include "simd.h"

namespace fastloss {

// atanh(y) / y = P(y^2) for y^2 in [0, 1/9]: relative error 8e-9. log(m) = 2 atanh((m - 1) / (m + 1)), and
// log1p(e) = 2 atanh(e / (2 + e)): no digit is lost where the logarithm is small.
constexpr float kAtanh[] = {1.f, 0x1.5554ep-2f, 0x1.99dacp-3f, 0x1.1e532ep-3f, 0x1.20822cp-3f};
constexpr float kSqrtHalf = 0.707106781f, kSmallestNormal = std::numeric_limits<float>::min();

namespace scalar {
struct Split {
  Vector fraction, exponent;
};
static inline Split split(Vector t) {
  int exponent;
  float fraction = std::frexp(t.value, &exponent);
  if (fraction < kSqrtHalf) fraction *= 2, --exponent;
  return {{fraction}, {float(exponent)}};
}
static inline Vector log_ratio(Vector p, Vector m, Vector apart) {
  return log_near_one(divide(p, m), divide(subtract(set(0.f), apart), m));
}
} // namespace scalar

#ifdef __x86_64__
namespace avx2 {
#define FASTLOSS_WORD static inline __attribute__((target("avx2,fma,f16c"), always_inline))
struct Split {
  Vector fraction, exponent;
};
FASTLOSS_WORD Split split(Vector t) {
  Vector lifted = where_less(t, set(kSmallestNormal), multiply(t, set(0x1p24f)), t);
  Vector lift = where_less(t, set(kSmallestNormal), set(-24.f), set(0.f));
  __m256i bits = _mm256_castps_si256(lifted), root = _mm256_castps_si256(set(kSqrtHalf));
  __m256i steps = _mm256_srai_epi32(_mm256_sub_epi32(bits, root), 23);
  __m256i fraction = _mm256_sub_epi32(bits, _mm256_slli_epi32(steps, 23));
  return {_mm256_castsi256_ps(fraction), add(_mm256_cvtepi32_ps(steps), lift)};
}
FASTLOSS_WORD Vector log_ratio(Vector p, Vector m, Vector apart) {
  Vector over = divide(set(1.f), m);
  return log_near_one(multiply(p, over), multiply(subtract(set(0.f), apart), over));
}
#undef FASTLOSS_WORD
} // namespace avx2

namespace avx512_common {
#define FASTLOSS_WORD static inline __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"), always_inline))
struct Split {
  Vector fraction, exponent;
};
FASTLOSS_WORD Split split(Vector t) {
  Vector exponent = add(_mm512_getexp_ps(multiply(t, set(kSqrtHalf))), set(1.f));
  return {_mm512_scalef_ps(t, subtract(set(0.f), exponent)), exponent};
}
// 2 atanh((p 2^k - m) / (p 2^k + m)) - k log 2: one division, and no exponent to take out of it.
FASTLOSS_WORD Vector log_ratio(Vector p, Vector m, Vector apart) {
  Vector steps = subtract(_mm512_getexp_ps(m), _mm512_getexp_ps(p)), lifted = _mm512_scalef_ps(p, steps);
  __mmask16 near = _mm512_cmp_ps_mask(steps, set(0.f), _CMP_EQ_OQ);
  Vector difference = _mm512_mask_sub_ps(subtract(lifted, m), near, set(0.f), apart);
  Vector y = divide(difference, add(lifted, m)), square = multiply(y, y), series = set(2 * kAtanh[4]);
  for (int i = 3; i >= 0; --i) series = multiply_add(series, square, set(2 * kAtanh[i]));
  return multiply_add(steps, set(-kLn2Float), multiply(series, y));
}
#undef FASTLOSS_WORD
} // namespace avx512_common
#endif

} // namespace fastloss
