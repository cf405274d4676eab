// A group of P7 numbers as vectors of bf16, for the engines of lossless_linear.cpp. They multiply its 128 numbers in
// the order in which they leave the decoder without a shuffle: of its first 64 those at even places, those at odd ones,
// then of the other 64; x is laid out in that order once.
#pragma once
#include "lossless_linear_rows.h"

#ifdef __x86_64__
#define FASTLOSS_BF16 __attribute__((target(FASTLOSS_AVX512_BYTES ",avx512bf16")))
#define FASTLOSS_BF16_INLINE inline __attribute__((target(FASTLOSS_AVX512_BYTES ",avx512bf16"), always_inline))

namespace fastloss::avx512vbmi {

constexpr int kQuarters = 4; // of a group, 32 numbers each

// Where number `j` of a group goes.
constexpr int place_in_group(int j) { return j / 64 * 64 + j % 2 * 32 + j % 64 / 2; }

// Byte 8 q + k: where the k-th of the 7 bytes of eight codes lies. Codes 8 l .. 8 l + 7 go to the lower half of lane l,
// codes 32 + 8 l .. to the upper one: unpacking halves of lanes then gives pairs in order.
struct SevensOfLanes {
  uint8_t place[64] = {};
  constexpr SevensOfLanes() {
    for (int q = 0; q < 8; ++q)
      for (int k = 0; k < 8; ++k) place[8 * q + k] = uint8_t(7 * (q / 2 + q % 2 * 4) + k);
  }
};
alignas(64) constexpr SevensOfLanes kSevensOfLanes;

class GroupDecoder {
public:
  FASTLOSS_BF16_INLINE explicit GroupDecoder(const uint8_t *table) {
    for (int i = 0; i < 4; ++i) table_[i] = load_bytes(table + 64 * i);
  }
  FASTLOSS_BF16_INLINE void decode(const uint8_t *codes, const uint8_t *low, Bytes (&w)[kQuarters]) const {
    const Bytes code = _mm512_multishift_epi64_epi8(shifts_, _mm512_permutexvar_epi8(sevens_, load_bytes(codes)));
    const Bytes first = _mm512_permutex2var_epi8(table_[0], code, table_[1]);
    const Bytes second = _mm512_permutex2var_epi8(table_[2], code, table_[3]);
    const Bytes fields[2] = {_mm512_unpacklo_epi8(first, second), _mm512_unpackhi_epi8(first, second)};
    for (int h = 0; h < 2; ++h) { // 16 bits hold the fields, or sign and mantissa, of an even number and its neighbour
      const Bytes both = load_bytes(low + 64 * h);
      w[2 * h] = with_field(_mm512_slli_epi16(fields[h], 7), _mm512_shuffle_epi8(both, even_));
      w[2 * h + 1] = with_field(_mm512_srli_epi16(fields[h], 1), _mm512_shuffle_epi8(both, odd_));
    }
  }

private:
  Bytes table_[4];
  const Bytes sevens_ = load_bytes(kSevensOfLanes.place);
  const Bytes shifts_ = _mm512_set1_epi64(0x312a231c150e0700); // as p7_fields

  // Sign and mantissa twice each: the sign from the upper byte, the mantissa from the lower one.
  const Bytes even_ = _mm512_set4_epi32(0x0e0e0c0c, 0x0a0a0808, 0x06060404, 0x02020000);
  const Bytes odd_ = _mm512_add_epi8(even_, _mm512_set1_epi8(1));

  // Bits 14 to 7 from `field`, the others from `rest`.
  static FASTLOSS_BF16_INLINE Bytes with_field(Bytes field, Bytes rest) {
    return _mm512_ternarylogic_epi64(field, rest, _mm512_set1_epi16(0x7f80), 0xe4);
  }
};

// Numbers `first`, `first` + 2, ... of 64.
template <int first> struct EverySecond {
  uint16_t place[32] = {};
  constexpr EverySecond() {
    for (int i = 0; i < 32; ++i) place[i] = uint16_t(2 * i + first);
  }
};
template <int first> alignas(64) constexpr EverySecond<first> kEverySecond;

// A group of x in the decoder's order.
FASTLOSS_BF16_INLINE void load_group(const uint16_t *x, Bytes (&group)[kQuarters]) {
  for (int h = 0; h < 2; ++h) {
    const Bytes begin = _mm512_loadu_si512(x + 64 * h), end = _mm512_loadu_si512(x + 64 * h + 32);
    group[2 * h] = _mm512_permutex2var_epi16(begin, _mm512_load_si512(kEverySecond<0>.place), end);
    group[2 * h + 1] = _mm512_permutex2var_epi16(begin, _mm512_load_si512(kEverySecond<1>.place), end);
  }
}

// Sixteen sums, rounded as from_float does.
FASTLOSS_BF16_INLINE __m256i rounded(__m512 sums) {
  const __m512i bits = _mm512_castps_si512(sums), last = _mm512_srli_epi32(_mm512_slli_epi32(bits, 15), 31);
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(sums, sums, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), is_nan, _mm512_set1_epi32(0x7fc0)));
}

// LinearEngine::write
FASTLOSS_BF16 static void write_sums(const LaidRows &x, const float *sums, int count, const uint16_t *bias,
                                     uint16_t *out, int64_t rows) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(int(x.stride)));
  for (int r = 0; r < count; r += 16) {
    const __mmask16 there = __mmask16((1u << std::min(16, count - r)) - 1);
    const __m512i bits =
        bias ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, bias + r)) : _mm512_setzero_si512();
    const __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    for (int64_t i = 0; i < x.n; ++i) {
      const __m512 sixteen = _mm512_i32gather_ps(places, sums + r * x.stride + i, sizeof(float));
      _mm256_mask_storeu_epi16(out + i * rows + r, there, rounded(_mm512_add_ps(sixteen, wide)));
    }
  }
}

} // namespace fastloss::avx512vbmi
#endif
