// The words of simd.h for planes of bits: ones that two rows have in common, counted in 64-bit lanes; and sums in
// int32.
//
// kAcross counters are summed over their lanes at once (`totals`). A row is a multiple of 64 bytes, so of every Word.
#pragma once
#include "simd.h"

namespace fastloss {

namespace scalar {
#define FASTLOSS_WORD static inline
typedef uint64_t Counter;
typedef uint64_t Word;
constexpr int64_t kWordBytes = 8;
constexpr int kAcross = 4, kDown = 1; // counters that the registers hold: kDown rows times kAcross others
FASTLOSS_WORD Counter no_ones() { return 0; }
FASTLOSS_WORD Word load_word(const uint8_t *p) {
  Word word;
  memcpy(&word, p, sizeof word);
  return word;
}
FASTLOSS_WORD Counter add_ones(Counter count, Word a, Word b) { return count + Counter(__builtin_popcountll(a & b)); }
FASTLOSS_WORD void totals(const Counter (&counts)[kAcross], int32_t *to) {
  for (int i = 0; i < kAcross; ++i) to[i] = int32_t(counts[i]);
}
FASTLOSS_WORD Vector load_sums(const int32_t *p) { return {float(*p)}; }
FASTLOSS_WORD void stream_sums(int32_t *p, const int32_t *sums) { memcpy(p, sums, 2 * sizeof *p); }
FASTLOSS_WORD unsigned sums_above(const int32_t *a, const int32_t *b) { return *a > *b; }
FASTLOSS_WORD unsigned lanes_not_negative(Vector a) { return a.value >= 0; }
#undef FASTLOSS_WORD
} // namespace scalar

#ifdef __x86_64__

namespace avx2 {
#define FASTLOSS_WORD static inline __attribute__((target("avx2,fma,f16c"), always_inline))
typedef __m256i Counter;
typedef __m256i Word;
constexpr int64_t kWordBytes = 32;
constexpr int kAcross = 4, kDown = 1;
FASTLOSS_WORD Counter no_ones() { return _mm256_setzero_si256(); }
FASTLOSS_WORD Word load_word(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
FASTLOSS_WORD Counter add_ones(Counter count, Word a, Word b) {
  const __m256i table =
      _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i nibble = _mm256_set1_epi8(15), both = _mm256_and_si256(a, b);
  const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(both, nibble));
  const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble));
  return _mm256_add_epi64(count, _mm256_sad_epu8(_mm256_add_epi8(low, high), _mm256_setzero_si256()));
}
FASTLOSS_WORD void totals(const Counter (&counts)[kAcross], int32_t *to) {
  __m256i pairs[2];
  for (int i = 0; i < 2; ++i)
    pairs[i] = _mm256_add_epi64(_mm256_unpacklo_epi64(counts[2 * i], counts[2 * i + 1]),
                                _mm256_unpackhi_epi64(counts[2 * i], counts[2 * i + 1]));
  const __m256i four = _mm256_add_epi64(_mm256_permute2x128_si256(pairs[0], pairs[1], 0x20),
                                        _mm256_permute2x128_si256(pairs[0], pairs[1], 0x31));
  const __m256i low = _mm256_permutevar8x32_epi32(four, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(low));
}
FASTLOSS_WORD Vector load_sums(const int32_t *p) { return _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i *)p)); }
FASTLOSS_WORD void stream_sums(int32_t *p, const int32_t *sums) { // 2 * kWidth of them past the cache
  for (int i = 0; i < 16; i += 8)
    _mm256_stream_si256((__m256i *)(p + i), _mm256_loadu_si256((const __m256i *)(sums + i)));
}
FASTLOSS_WORD unsigned sums_above(const int32_t *a, const int32_t *b) {
  const __m256i above =
      _mm256_cmpgt_epi32(_mm256_loadu_si256((const __m256i *)a), _mm256_loadu_si256((const __m256i *)b));
  return unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(above)));
}
FASTLOSS_WORD unsigned lanes_not_negative(Vector a) {
  return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_GE_OQ)));
}
#undef FASTLOSS_WORD
} // namespace avx2

namespace avx512 {
#define FASTLOSS_WORD static inline __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"), always_inline))
typedef __m512i Counter;
typedef __m512i Word;
constexpr int64_t kWordBytes = 64;
constexpr int kAcross = 8, kDown = 2;
FASTLOSS_WORD Counter no_ones() { return _mm512_setzero_si512(); }
FASTLOSS_WORD Word load_word(const uint8_t *p) { return _mm512_loadu_si512(p); }
FASTLOSS_WORD Counter add_ones(Counter count, Word a, Word b) {
  const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m512i nibble = _mm512_set1_epi8(15), both = _mm512_and_si512(a, b);
  const __m512i low = _mm512_shuffle_epi8(table, _mm512_and_si512(both, nibble));
  const __m512i high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble));
  return _mm512_add_epi64(count, _mm512_sad_epu8(_mm512_add_epi8(low, high), _mm512_setzero_si512()));
}
FASTLOSS_WORD void totals(const Counter (&counts)[kAcross], int32_t *to) {
  __m512i pairs[4], fours[2]; // of lanes: 0 1 0 1 .., then 0 1 2 3 0 1 2 3
  for (int i = 0; i < 4; ++i)
    pairs[i] = _mm512_add_epi64(_mm512_unpacklo_epi64(counts[2 * i], counts[2 * i + 1]),
                                _mm512_unpackhi_epi64(counts[2 * i], counts[2 * i + 1]));
  for (int i = 0; i < 2; ++i)
    fours[i] = _mm512_add_epi64(_mm512_shuffle_i64x2(pairs[2 * i], pairs[2 * i + 1], 0x88),
                                _mm512_shuffle_i64x2(pairs[2 * i], pairs[2 * i + 1], 0xdd));
  // Blocks of 128 bits are now 01 01 23 23 and 45 45 67 67.
  const __m512i eight =
      _mm512_add_epi64(_mm512_shuffle_i64x2(fours[0], fours[1], 0x88), _mm512_shuffle_i64x2(fours[0], fours[1], 0xdd));
  _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi64_epi32(eight));
}
FASTLOSS_WORD Vector load_sums(const int32_t *p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
FASTLOSS_WORD void stream_sums(int32_t *p, const int32_t *sums) {
  for (int i = 0; i < 32; i += 16) _mm512_stream_si512((__m512i *)(p + i), _mm512_loadu_si512(sums + i));
}
FASTLOSS_WORD unsigned sums_above(const int32_t *a, const int32_t *b) {
  return _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(a), _mm512_loadu_si512(b));
}
FASTLOSS_WORD unsigned lanes_not_negative(Vector a) { return _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_GE_OQ); }
#undef FASTLOSS_WORD
} // namespace avx512

// The same registers on a processor that counts the ones of a word by itself.
namespace popcount512 {
#define FASTLOSS_WORD                                                                                                  \
  static inline __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq"), always_inline))
using avx512::Counter;
using avx512::kAcross;
using avx512::kDown;
using avx512::kWordBytes;
using avx512::load_word;
using avx512::no_ones;
using avx512::totals;
using avx512::Word;
FASTLOSS_WORD Counter add_ones(Counter count, Word a, Word b) {
  return _mm512_add_epi64(count, _mm512_popcnt_epi64(_mm512_and_si512(a, b)));
}
#undef FASTLOSS_WORD
} // namespace popcount512

#endif

} // namespace fastloss
