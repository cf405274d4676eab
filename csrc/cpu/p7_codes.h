// The code of each pair of fields, packed: 64 pairs of a group in 56 bytes. Plain code, and AVX-512 VBMI, whose byte
// shuffles hold the whole table in registers.
#pragma once
#include "encoder_blocks.h"
#include "simd_bytes.h"

#include <cstring>

namespace fastloss {

constexpr int kPairs = int(kLosslessGroup) / 2; // of a group, and codes of 7 bits
constexpr int kCodeBytes = kPairs * 7 / 8;      // of a group

// first field | second field << 8 -> code, kEscapeCode where the table has no such pair.
struct PairCodes {
  uint8_t code[1 << 16];
  // The same by ranks of fields, where the table holds fewer than kRanks different ones; the last rank is of all
  // others.
  static constexpr int kRanks = 32;
  bool ranked;
  uint8_t rank[256], code_of_ranks[kRanks * kRanks];

  explicit PairCodes(const uint8_t *table) {
    memset(code, kEscapeCode, sizeof code);
    for (int c = kEscapeCode; c-- > 0;) code[table[c] | table[128 + c] << 8] = uint8_t(c); // of equal entries the first
    memset(rank, kRanks - 1, sizeof rank);
    memset(code_of_ranks, kEscapeCode, sizeof code_of_ranks);
    int ranks = 0;
    uint8_t field[256];
    for (int i = 0; i < 2 * kEscapeCode && ranks < kRanks; ++i) {
      const uint8_t f = table[i < kEscapeCode ? i : i + 1];
      if (rank[f] == kRanks - 1) field[ranks] = f, rank[f] = uint8_t(ranks++);
    }
    ranked = ranks < kRanks;
    for (int second = 0; second < ranks; ++second)
      for (int first = 0; first < ranks; ++first)
        code_of_ranks[first + kRanks * second] = code[field[first] | field[second] << 8];
  }
};

// Writes the codes of whole groups of fields; bit k of escaped[g]: pair k of group g has none.
// ahead: called once for each.
using EncodeGroups = void (*)(const PairCodes &codes, const uint8_t *fields, int64_t groups, uint8_t *out,
                              uint64_t *escaped, Ahead ahead);

namespace scalar {
inline void encode_groups(const PairCodes &codes, const uint8_t *fields, int64_t groups, uint8_t *out,
                          uint64_t *escaped, Ahead ahead) {
  constexpr uint64_t kLow = 0x3f * 0x0002040810204081, kTop = 0x40 * 0x0002040810204081; // of eight codes
  for (int64_t g = 0; g < groups; ++g) {
    escaped[g] = 0;
    ahead.some();
    for (int k = 0; k < kPairs; k += 8, fields += 16, out += 7) {
      uint64_t eight = 0;
      for (int i = 0; i < 8; ++i) {
        uint16_t pair;
        memcpy(&pair, fields + 2 * i, 2);
        eight |= uint64_t(codes.code[pair]) << 7 * i;
      }
      memcpy(out, &eight, 7);
      if (((eight & kLow) + kTop / 64) & eight & kTop) // a carry out of the low six bits, and the top one set
        for (int i = 0; i < 8; ++i)
          if ((eight >> 7 * i & 127) == kEscapeCode) escaped[g] |= uint64_t(1) << (k + i);
    }
  }
}
} // namespace scalar

#ifdef __x86_64__
namespace avx512vbmi {
#define FASTLOSS_VBMI __attribute__((target(FASTLOSS_AVX512_BYTES)))

// 64 codes of a byte each to 56 bytes: pairs of 7 bits become 14, then 28, then 56.
FASTLOSS_VBMI inline void store_packed(uint8_t *out, __m512i codes) {
  const __m512i fourteen = _mm512_maddubs_epi16(_mm512_set1_epi16(int16_t(128 << 8 | 1)), codes);
  const __m512i half = _mm512_madd_epi16(fourteen, _mm512_set1_epi32(1 << (16 + 14) | 1));
  const __m512i low = _mm512_and_si512(half, _mm512_set1_epi64((1 << 28) - 1));
  const __m512i high = _mm512_andnot_si512(_mm512_set1_epi64((1 << 28) - 1), _mm512_srli_epi64(half, 4));
  alignas(64) uint8_t seven_of_eight[64];
  for (int i = 0; i < 64; ++i) seven_of_eight[i] = uint8_t(i < kCodeBytes ? i / 7 * 8 + i % 7 : 0);
  const __m512i bytes = _mm512_permutexvar_epi8(_mm512_load_si512(seven_of_eight), _mm512_or_si512(low, high));
  _mm512_mask_storeu_epi8(out, (uint64_t(1) << kCodeBytes) - 1, bytes);
}

// PairCodes with ranks: 64 fields to ranks by 256 entries in four registers, 64 pairs of ranks to codes by 1024 in
// sixteen.
FASTLOSS_VBMI inline void encode_groups(const PairCodes &codes, const uint8_t *fields, int64_t groups, uint8_t *out,
                                        uint64_t *escaped, Ahead ahead) {
  alignas(64) uint8_t first_of_pair[64], second_of_pair[64];
  for (int i = 0; i < 64; ++i) first_of_pair[i] = uint8_t(2 * i), second_of_pair[i] = uint8_t(2 * i + 1);
  const __m512i firsts = _mm512_load_si512(first_of_pair), seconds = _mm512_load_si512(second_of_pair);
  for (int64_t g = 0; g < groups; ++g, fields += kLosslessGroup, out += kCodeBytes) {
    ahead.some();
    __m512i rank[2];
    for (int h = 0; h < 2; ++h) {
      const __m512i field = _mm512_loadu_si512(fields + 64 * h);
      const __m512i below = _mm512_permutex2var_epi8(load_bytes(codes.rank), field, load_bytes(codes.rank + 64));
      const __m512i above = _mm512_permutex2var_epi8(load_bytes(codes.rank + 128), field, load_bytes(codes.rank + 192));
      rank[h] = _mm512_mask_blend_epi8(_mm512_movepi8_mask(field), below, above);
    }
    const __m512i first = _mm512_permutex2var_epi8(rank[0], firsts, rank[1]);
    const __m512i second = _mm512_permutex2var_epi8(rank[0], seconds, rank[1]);
    // Seven bits of the index choose among 128 entries, the other three which 128.
    const __m512i index =
        _mm512_or_si512(first, _mm512_and_si512(_mm512_slli_epi16(second, 5), _mm512_set1_epi8(0x60)));
    __m512i found[8];
    for (int t = 0; t < 8; ++t)
      found[t] = _mm512_permutex2var_epi8(load_bytes(codes.code_of_ranks + 128 * t), index,
                                          load_bytes(codes.code_of_ranks + 128 * t + 64));
    for (int bit = 0, left = 8; bit < 3; ++bit) {
      const __mmask64 upper = _mm512_test_epi8_mask(second, _mm512_set1_epi8(char(4 << bit)));
      left /= 2;
      for (int t = 0; t < left; ++t) found[t] = _mm512_mask_blend_epi8(upper, found[2 * t], found[2 * t + 1]);
    }
    escaped[g] = _mm512_cmpeq_epi8_mask(found[0], _mm512_set1_epi8(kEscapeCode));
    store_packed(out, found[0]);
  }
}
#undef FASTLOSS_VBMI
} // namespace avx512vbmi
#endif

} // namespace fastloss
