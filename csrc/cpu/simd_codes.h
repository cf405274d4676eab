// The words of simd.h for quantisers: rounding, division by one number many times, and codes of 8 and 4 bits.
//
// round_even rounds half to even, round_down to the integer below. where_equal(a, b, yes, no) is `no` where either is
// NaN. quotient(a, divisor_of(s, 1 / s)) is a / s rounded once, as the division makes it. store_codes writes the
// integers 0..255 of a vector as bytes. pack_halves joins 2 * count codes below 16 to `count` bytes, the even ones in
// the low halves; spread_halves is the way back.
#pragma once
#include "simd.h"

namespace fastloss {

// Where a Newton step on the quotient is exact: neither it nor the remainder leaves the normal numbers.
constexpr float kQuotientLeast = 0x1p-40f, kQuotientMost = 0x1p40f, kDivisorLeast = 0x1p-40f, kDivisorMost = 0x1p40f;

namespace scalar {
#define FASTLOSS_WORD static inline
struct Divisor {
  Vector by;
};
FASTLOSS_WORD Divisor divisor_of(Vector by, Vector) { return {by}; }
FASTLOSS_WORD Vector quotient(Vector a, const Divisor &d) { return divide(a, d.by); }
FASTLOSS_WORD Vector round_even(Vector a) { return {std::nearbyint(a.value)}; }
FASTLOSS_WORD Vector round_down(Vector a) { return {std::floor(a.value)}; }
FASTLOSS_WORD Vector where_equal(Vector a, Vector b, Vector yes, Vector no) { return a.value == b.value ? yes : no; }
FASTLOSS_WORD void store_codes(uint8_t *p, Vector a) { *p = uint8_t(a.value); }
FASTLOSS_WORD void pack_halves(const uint8_t *codes, int64_t count, uint8_t *bytes) {
  for (int64_t i = 0; i < count; ++i) bytes[i] = uint8_t(codes[2 * i] | codes[2 * i + 1] << 4);
}
FASTLOSS_WORD void spread_halves(const uint8_t *bytes, int64_t count, uint8_t *codes) {
  for (int64_t i = 0; i < count; ++i) codes[2 * i] = bytes[i] & 15, codes[2 * i + 1] = bytes[i] >> 4;
}
#undef FASTLOSS_WORD
} // namespace scalar

#ifdef __x86_64__

// Division costs the processor five times what the rest of a quantiser does. With the rounded reciprocal r of s, q = a
// r is within 1.5 units of a / s; one step q + (a - q s) r is within one, and a second is the quotient correctly
// rounded (Markstein's theorem), as long as nothing overflows or underflows. Vectors with a number that might are
// divided.
namespace avx2 {
#define FASTLOSS_WORD static inline __attribute__((target("avx2,fma,f16c"), always_inline))
struct Divisor {
  Vector by, inverse;
};
// An inverse of NaN sends every vector to the division.
FASTLOSS_WORD Divisor divisor_of(Vector by, Vector inverse) {
  const Vector size = absolute(by), nan = set(std::numeric_limits<float>::quiet_NaN());
  inverse = where_less(size, set(kDivisorLeast), nan, inverse);
  return {by, where_less(size, set(kDivisorMost), inverse, nan)};
}
FASTLOSS_WORD Vector quotient(Vector a, const Divisor &d) {
  Vector q = multiply(a, d.inverse), size = absolute(q);
  const Vector small =
      _mm256_and_ps(_mm256_cmp_ps(size, set(kQuotientLeast), _CMP_LT_OQ), _mm256_cmp_ps(a, set(0.f), _CMP_NEQ_OQ));
  const Vector unsafe = _mm256_or_ps(small, _mm256_cmp_ps(size, set(kQuotientMost), _CMP_NLE_UQ));
  if (__builtin_expect(_mm256_movemask_ps(unsafe), 0)) return divide(a, d.by);
  q = multiply_add(_mm256_fnmadd_ps(q, d.by, a), d.inverse, q);
  return multiply_add(_mm256_fnmadd_ps(q, d.by, a), d.inverse, q);
}
FASTLOSS_WORD Vector round_even(Vector a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FASTLOSS_WORD Vector round_down(Vector a) { return _mm256_floor_ps(a); }
FASTLOSS_WORD Vector where_equal(Vector a, Vector b, Vector yes, Vector no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_EQ_OQ));
}
FASTLOSS_WORD void store_codes(uint8_t *p, Vector a) {
  const __m256i wide = _mm256_cvtps_epi32(a);
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64((__m128i *)p, _mm_packus_epi16(halves, halves));
}
FASTLOSS_WORD void pack_halves(const uint8_t *codes, int64_t count, uint8_t *bytes) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m256i pairs = _mm256_loadu_si256((const __m256i *)(codes + 2 * i));
    const __m256i joined = _mm256_maddubs_epi16(pairs, _mm256_set1_epi16(0x1001)); // low + 16 high
    const __m128i packed = _mm_packus_epi16(_mm256_castsi256_si128(joined), _mm256_extracti128_si256(joined, 1));
    _mm_storeu_si128((__m128i *)(bytes + i), packed);
  }
  scalar::pack_halves(codes + 2 * i, count - i, bytes + i);
}
FASTLOSS_WORD void spread_halves(const uint8_t *bytes, int64_t count, uint8_t *codes) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(bytes + i)));
    const __m256i both = _mm256_or_si256(wide, _mm256_slli_epi16(wide, 4));
    _mm256_storeu_si256((__m256i *)(codes + 2 * i), _mm256_and_si256(both, _mm256_set1_epi8(15)));
  }
  scalar::spread_halves(bytes + i, count - i, codes + 2 * i);
}
#undef FASTLOSS_WORD
} // namespace avx2

namespace avx512_common {
#define FASTLOSS_WORD static inline __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"), always_inline))
struct Divisor {
  Vector by, inverse;
};
FASTLOSS_WORD Divisor divisor_of(Vector by, Vector inverse) {
  const Vector size = absolute(by), nan = set(std::numeric_limits<float>::quiet_NaN());
  inverse = where_less(size, set(kDivisorLeast), nan, inverse);
  return {by, where_less(size, set(kDivisorMost), inverse, nan)};
}
FASTLOSS_WORD Vector quotient(Vector a, const Divisor &d) {
  Vector q = multiply(a, d.inverse), size = absolute(q);
  const __mmask16 tiny = _mm512_cmp_ps_mask(size, set(kQuotientLeast), _CMP_LT_OQ);
  const __mmask16 small = _mm512_mask_cmp_ps_mask(tiny, a, set(0.f), _CMP_NEQ_OQ);
  const __mmask16 unsafe = small | _mm512_cmp_ps_mask(size, set(kQuotientMost), _CMP_NLE_UQ);
  if (__builtin_expect(unsafe, 0)) return divide(a, d.by);
  q = multiply_add(_mm512_fnmadd_ps(q, d.by, a), d.inverse, q);
  return multiply_add(_mm512_fnmadd_ps(q, d.by, a), d.inverse, q);
}
FASTLOSS_WORD Vector round_even(Vector a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FASTLOSS_WORD Vector round_down(Vector a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
FASTLOSS_WORD Vector where_equal(Vector a, Vector b, Vector yes, Vector no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), no, yes);
}
FASTLOSS_WORD void store_codes(uint8_t *p, Vector a) {
  _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a)));
}
FASTLOSS_WORD void pack_halves(const uint8_t *codes, int64_t count, uint8_t *bytes) {
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m512i pairs = _mm512_loadu_si512(codes + 2 * i);
    const __m512i joined = _mm512_maddubs_epi16(pairs, _mm512_set1_epi16(0x1001)); // low + 16 high
    _mm256_storeu_si256((__m256i *)(bytes + i), _mm512_cvtepi16_epi8(joined));
  }
  scalar::pack_halves(codes + 2 * i, count - i, bytes + i);
}
FASTLOSS_WORD void spread_halves(const uint8_t *bytes, int64_t count, uint8_t *codes) {
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(bytes + i)));
    const __m512i both = _mm512_or_si512(wide, _mm512_slli_epi16(wide, 4));
    _mm512_storeu_si512(codes + 2 * i, _mm512_and_si512(both, _mm512_set1_epi8(15)));
  }
  scalar::spread_halves(bytes + i, count - i, codes + 2 * i);
}
#undef FASTLOSS_WORD
} // namespace avx512_common

#endif

} // namespace fastloss
