// bf16 split with AVX-512 VBMI: half the work of what the compiler makes of lossless_split.inc.
#pragma once
#ifdef __x86_64__
#include "byte_look_up.h"
#include "lossless_split.h"

namespace fastloss {
namespace avx512vbmi {

// Bits of `a` where `mask` has ones, else of `b`.
FASTLOSS_VBMI_INLINE __m512i chosen(__m512i mask, __m512i a, __m512i b) {
  return _mm512_ternarylogic_epi32(mask, a, b, 0xca);
}

// 64 numbers at a time, those of the second 32 in the high bytes of the words of the first.
template <bool kFieldOnly>
FASTLOSS_VBMI static void split_bf16(const uint8_t *numbers, int64_t groups, const SplitParts &parts) {
  alignas(64) uint8_t in_order[64];
  for (int i = 0; i < 64; ++i) in_order[i] = uint8_t(i < 32 ? 2 * i : 2 * (i - 32) + 1);
  const __m512i order = _mm512_load_si512(in_order), low_byte = _mm512_set1_epi16(0x00ff);
  const __m512i low_sign = _mm512_set1_epi16(0x0080), high_sign = _mm512_set1_epi16(int16_t(0x8000));
  for (int64_t i = 0; i < groups * kLosslessGroup; i += 64) {
    const __m512i a = _mm512_loadu_si512(numbers + 2 * i), b = _mm512_loadu_si512(numbers + 2 * i + 64);
    const __m512i fields = chosen(low_byte, _mm512_srli_epi16(a, 7), _mm512_slli_epi16(b, 1));
    _mm512_storeu_si512(parts.field + i, _mm512_permutexvar_epi8(order, fields));
    if constexpr (!kFieldOnly) {
      const __m512i low = chosen(low_sign, _mm512_srli_epi16(a, 8), a);
      const __m512i high = chosen(high_sign, b, _mm512_slli_epi16(b, 8));
      const __m512i plane = _mm512_permutexvar_epi8(order, chosen(low_byte, low, high));
      _mm512_storeu_si512(parts.bytes[0] + i, plane);
    }
  }
}

} // namespace avx512vbmi
} // namespace fastloss
#endif
