// The words of simd.h that the bit kernels need: one bit a lane, both ways, small integers, and sums in double.
//
// lanes_at_least(a, b) has a bit where a >= b, none where either is NaN; `where_lanes` chooses by such bits, and
// `store_lanes` / `load_lanes` write and read those of lanes i, i + 1, ... of a row of bits (i a multiple of kWidth).
#pragma once
#include "simd_bits.h"

namespace fastloss {

namespace scalar {
#define FASTLOSS_WORD static inline
FASTLOSS_WORD unsigned lanes_at_least(Vector a, Vector b) { return a.value >= b.value; }
FASTLOSS_WORD Vector where_lanes(unsigned lanes, Vector yes, Vector no) { return lanes ? yes : no; }
// The row must have been zeroed: eight of these make a byte.
FASTLOSS_WORD void store_lanes(uint8_t *row, int64_t i, unsigned lanes) { row[i / 8] |= uint8_t(lanes << i % 8); }
FASTLOSS_WORD unsigned load_lanes(const uint8_t *row, int64_t i) { return row[i / 8] >> i % 8 & 1; }
FASTLOSS_WORD Vector round_even(Vector a) { return {std::nearbyint(a.value)}; }
FASTLOSS_WORD Bits integers(Vector a) { return {uint32_t(int32_t(a.value))}; }
FASTLOSS_WORD unsigned lanes_with_bit(Bits a, int bit) { return a.value >> bit & 1; }
// Numbers that are integers from 0 to 255.
FASTLOSS_WORD void store_bytes(uint8_t *p, Vector a) { *p = uint8_t(a.value); }
FASTLOSS_WORD Vector look_up(const float *table, const uint8_t *index) { return {table[*index]}; }
struct WideSum {
  double value = 0;
};
FASTLOSS_WORD void add_wide(WideSum &sum, Vector a) { sum.value += a.value; }
FASTLOSS_WORD double total(const WideSum &sum) { return sum.value; }
FASTLOSS_WORD void add_to(double *p, Vector a) { *p += a.value; }
#undef FASTLOSS_WORD
} // namespace scalar

#ifdef __x86_64__

namespace avx2 {
#define FASTLOSS_WORD static inline __attribute__((target("avx2,fma,f16c"), always_inline))
FASTLOSS_WORD unsigned lanes_at_least(Vector a, Vector b) {
  return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}
FASTLOSS_WORD Vector where_lanes(unsigned lanes, Vector yes, Vector no) {
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  __m256i chosen = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(lanes)), each), each);
  return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(chosen));
}
FASTLOSS_WORD void store_lanes(uint8_t *row, int64_t i, unsigned lanes) { row[i / 8] = uint8_t(lanes); }
FASTLOSS_WORD unsigned load_lanes(const uint8_t *row, int64_t i) { return row[i / 8]; }
FASTLOSS_WORD Vector round_even(Vector a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FASTLOSS_WORD Bits integers(Vector a) { return _mm256_cvtps_epi32(a); }
FASTLOSS_WORD unsigned lanes_with_bit(Bits a, int bit) {
  __m256i top = _mm256_sll_epi32(a, _mm_cvtsi32_si128(31 - bit));
  return unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(top)));
}
FASTLOSS_WORD void store_bytes(uint8_t *p, Vector a) {
  __m256i wide = _mm256_cvtps_epi32(a);
  __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64((__m128i *)p, _mm_packus_epi16(words, words));
}
FASTLOSS_WORD Vector look_up(const float *table, const uint8_t *index) {
  __m256i at = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)index));
  return _mm256_i32gather_ps(table, at, 4);
}
struct WideSum {
  __m256d low = {0, 0, 0, 0}, high = {0, 0, 0, 0};
};
FASTLOSS_WORD void add_wide(WideSum &sum, Vector a) {
  sum.low = _mm256_add_pd(sum.low, _mm256_cvtps_pd(_mm256_castps256_ps128(a)));
  sum.high = _mm256_add_pd(sum.high, _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)));
}
FASTLOSS_WORD double total(const WideSum &sum) {
  __m256d four = _mm256_add_pd(sum.low, sum.high);
  __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
FASTLOSS_WORD void add_to(double *p, Vector a) {
  _mm256_storeu_pd(p, _mm256_add_pd(_mm256_loadu_pd(p), _mm256_cvtps_pd(_mm256_castps256_ps128(a))));
  _mm256_storeu_pd(p + 4, _mm256_add_pd(_mm256_loadu_pd(p + 4), _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1))));
}
#undef FASTLOSS_WORD
} // namespace avx2

namespace avx512_common {
#define FASTLOSS_WORD static inline __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"), always_inline))
FASTLOSS_WORD unsigned lanes_at_least(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
FASTLOSS_WORD Vector where_lanes(unsigned lanes, Vector yes, Vector no) {
  return _mm512_mask_blend_ps(__mmask16(lanes), no, yes);
}
FASTLOSS_WORD void store_lanes(uint8_t *row, int64_t i, unsigned lanes) {
  const uint16_t sixteen = uint16_t(lanes);
  memcpy(row + i / 8, &sixteen, sizeof sixteen);
}
FASTLOSS_WORD unsigned load_lanes(const uint8_t *row, int64_t i) {
  uint16_t sixteen;
  memcpy(&sixteen, row + i / 8, sizeof sixteen);
  return sixteen;
}
FASTLOSS_WORD Vector round_even(Vector a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FASTLOSS_WORD Bits integers(Vector a) { return _mm512_cvtps_epi32(a); }
FASTLOSS_WORD unsigned lanes_with_bit(Bits a, int bit) { return _mm512_test_epi32_mask(a, set_bits(1u << bit)); }
FASTLOSS_WORD void store_bytes(uint8_t *p, Vector a) {
  _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a)));
}
FASTLOSS_WORD Vector look_up(const float *table, const uint8_t *index) {
  return _mm512_i32gather_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)index)), table, 4);
}
struct WideSum {
  __m512d low = {0, 0, 0, 0, 0, 0, 0, 0}, high = {0, 0, 0, 0, 0, 0, 0, 0};
};
FASTLOSS_WORD __m256 upper_half(Vector a) { return _mm512_extractf32x8_ps(a, 1); }
FASTLOSS_WORD void add_wide(WideSum &sum, Vector a) {
  sum.low = _mm512_add_pd(sum.low, _mm512_cvtps_pd(_mm512_castps512_ps256(a)));
  sum.high = _mm512_add_pd(sum.high, _mm512_cvtps_pd(upper_half(a)));
}
FASTLOSS_WORD double total(const WideSum &sum) { return _mm512_reduce_add_pd(_mm512_add_pd(sum.low, sum.high)); }
FASTLOSS_WORD void add_to(double *p, Vector a) {
  _mm512_storeu_pd(p, _mm512_add_pd(_mm512_loadu_pd(p), _mm512_cvtps_pd(_mm512_castps512_ps256(a))));
  _mm512_storeu_pd(p + 8, _mm512_add_pd(_mm512_loadu_pd(p + 8), _mm512_cvtps_pd(upper_half(a))));
}
#undef FASTLOSS_WORD
} // namespace avx512_common

#endif

} // namespace fastloss
