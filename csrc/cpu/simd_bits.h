// The words of simd.h for 32-bit integers: what a counter-based generator of random numbers is made of.
//
// A vector of `Bits` holds one counter a lane. A generator makes four numbers of each, as four vectors; `deal` turns
// these into the numbers of 4 * kWidth columns in their order, given that lane l began with counter `counters(first)`.
#pragma once
#include "simd.h"

namespace fastloss {

namespace scalar {
#define FASTLOSS_WORD static inline
struct Bits {
  uint32_t value;
};
FASTLOSS_WORD Bits set_bits(uint32_t a) { return {a}; }
FASTLOSS_WORD Bits counters(uint32_t first) { return {first}; }
FASTLOSS_WORD Bits exclusive_or(Bits a, Bits b, Bits c) { return {a.value ^ b.value ^ c.value}; }
FASTLOSS_WORD void multiply_wide(Bits a, Bits b, Bits &high, Bits &low) {
  uint64_t product = uint64_t(a.value) * b.value;
  high.value = uint32_t(product >> 32), low.value = uint32_t(product);
}
FASTLOSS_WORD void deal(Bits (&)[4]) {}
// The upper 24 bits as a number: exact in fp32.
FASTLOSS_WORD Vector upper(Bits a) { return {float(a.value >> 8)}; }
FASTLOSS_WORD void store_bits(uint32_t *p, Bits a) { *p = a.value; }
// One bit a lane.
FASTLOSS_WORD uint64_t lanes_less(Vector a, Vector b) { return a.value < b.value; }
#undef FASTLOSS_WORD
} // namespace scalar

#ifdef __x86_64__

namespace avx2 {
#define FASTLOSS_WORD static inline __attribute__((target("avx2,fma,f16c"), always_inline))
typedef __m256i Bits;
FASTLOSS_WORD Bits set_bits(uint32_t a) { return _mm256_set1_epi32(int(a)); }
FASTLOSS_WORD Bits counters(uint32_t first) {
  return _mm256_add_epi32(set_bits(first), _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
}
FASTLOSS_WORD Bits exclusive_or(Bits a, Bits b, Bits c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
FASTLOSS_WORD void multiply_wide(Bits a, Bits b, Bits &high, Bits &low) {
  Bits even = _mm256_mul_epu32(a, b), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), b);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}
FASTLOSS_WORD void deal(Bits (&words)[4]) {
  Bits a = _mm256_unpacklo_epi32(words[0], words[1]), b = _mm256_unpackhi_epi32(words[0], words[1]);
  Bits c = _mm256_unpacklo_epi32(words[2], words[3]), d = _mm256_unpackhi_epi32(words[2], words[3]);
  words[0] = _mm256_unpacklo_epi64(a, c), words[1] = _mm256_unpackhi_epi64(a, c);
  words[2] = _mm256_unpacklo_epi64(b, d), words[3] = _mm256_unpackhi_epi64(b, d);
}
FASTLOSS_WORD Vector upper(Bits a) { return _mm256_cvtepi32_ps(_mm256_srli_epi32(a, 8)); }
FASTLOSS_WORD void store_bits(uint32_t *p, Bits a) { _mm256_storeu_si256((__m256i *)p, a); }
FASTLOSS_WORD uint64_t lanes_less(Vector a, Vector b) {
  return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)));
}
#undef FASTLOSS_WORD
} // namespace avx2

namespace avx512_common {
#define FASTLOSS_WORD static inline __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"), always_inline))
typedef __m512i Bits;
FASTLOSS_WORD Bits set_bits(uint32_t a) { return _mm512_set1_epi32(int(a)); }
FASTLOSS_WORD Bits counters(uint32_t first) {
  return _mm512_add_epi32(set_bits(first), _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
}
FASTLOSS_WORD Bits exclusive_or(Bits a, Bits b, Bits c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
FASTLOSS_WORD void multiply_wide(Bits a, Bits b, Bits &high, Bits &low) {
  Bits even = _mm512_mul_epu32(a, b), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b);
  high = _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
  low = _mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CCAA);
}
FASTLOSS_WORD void deal(Bits (&words)[4]) {
  Bits a = _mm512_unpacklo_epi32(words[0], words[1]), b = _mm512_unpackhi_epi32(words[0], words[1]);
  Bits c = _mm512_unpacklo_epi32(words[2], words[3]), d = _mm512_unpackhi_epi32(words[2], words[3]);
  words[0] = _mm512_unpacklo_epi64(a, c), words[1] = _mm512_unpackhi_epi64(a, c);
  words[2] = _mm512_unpacklo_epi64(b, d), words[3] = _mm512_unpackhi_epi64(b, d);
}
FASTLOSS_WORD Vector upper(Bits a) { return _mm512_cvtepi32_ps(_mm512_srli_epi32(a, 8)); }
FASTLOSS_WORD void store_bits(uint32_t *p, Bits a) { _mm512_storeu_si512(p, a); }
FASTLOSS_WORD uint64_t lanes_less(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
#undef FASTLOSS_WORD
} // namespace avx512_common

#endif

} // namespace fastloss
