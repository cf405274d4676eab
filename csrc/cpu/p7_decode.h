// The fields of P7 (docs/design.md, "The lossless contract"): 56 bytes of codes are a group of 128 fields. For each
// instruction set of simd_bytes.h
//
//     p7_fields(table, codes, groups, fields)
//
// reads the table's 256 bytes, 56 bytes of codes a group and at most 8 behind them, and writes 128 fields a group.
#pragma once
#include "../lossless.h"
#include "simd_bytes.h"

namespace fastloss {

constexpr int64_t kP7GroupBytes = kLosslessGroup / 16 * 7;

namespace scalar {
[[maybe_unused]] static void p7_fields(const uint8_t *table, const uint8_t *codes, int64_t groups, uint8_t *fields) {
  for (int64_t i = 0; i < 8 * groups; ++i, codes += 7, fields += 16) {
    uint64_t eight;
    memcpy(&eight, codes, sizeof eight);
    for (int k = 0; k < 8; ++k) {
      const int code = int(eight >> 7 * k & 127);
      fields[2 * k] = table[code], fields[2 * k + 1] = table[128 + code];
    }
  }
}
} // namespace scalar

#ifdef __x86_64__
#define FASTLOSS_WORD [[maybe_unused]] static inline __attribute__((target(FASTLOSS_AVX2_BYTES), always_inline))
namespace avx2 {

// 128 entries by look-ups of 16: entry c is the exclusive or of steps[t][c - 16 t] over all t with c >= 16 t, since a
// shuffle makes 0 of a negative index.
struct Lookup128 {
  Bytes steps[8]; // the 16 of each in both halves
};
FASTLOSS_WORD Lookup128 lookup_of(const uint8_t *entries) {
  Lookup128 lookup;
  Bytes before = _mm256_setzero_si256();
  for (int t = 0; t < 8; ++t) {
    const Bytes part =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(entries + 16 * t)));
    lookup.steps[t] = _mm256_xor_si256(part, before);
    before = part;
  }
  return lookup;
}
// Eight codes in each half, as 16-bit numbers: a code lies within two neighbouring bytes, and a product moves it to
// the top of these.
FASTLOSS_WORD Bytes sixteen_codes(const uint8_t *codes) {
  const Bytes places =
      _mm256_setr_epi8(0, 1, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 0, 1, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7);
  const Bytes shifts = _mm256_setr_epi16(512, 4, 8, 16, 32, 64, 128, 256, 512, 4, 8, 16, 32, 64, 128, 256);
  const Bytes both = _mm256_set_m128i(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(codes + 7)),
                                      _mm_loadl_epi64(reinterpret_cast<const __m128i *>(codes)));
  return _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(both, places), shifts), 9);
}

[[maybe_unused]] __attribute__((target(FASTLOSS_AVX2_BYTES))) static void
p7_fields(const uint8_t *table, const uint8_t *codes, int64_t groups, uint8_t *fields) {
  const Lookup128 firsts = lookup_of(table), seconds = lookup_of(table + 128);
  for (int64_t i = 0; i < 2 * groups; ++i, codes += 28, fields += 2 * kBytes) {
    Bytes code = _mm256_packus_epi16(sixteen_codes(codes), sixteen_codes(codes + 14)); // codes 0..7, 16..23 | 8.., 24..
    Bytes first = _mm256_setzero_si256(), second = first;
    for (int t = 0; t < 8; ++t, code = _mm256_sub_epi8(code, all_bytes(16))) {
      first = _mm256_xor_si256(first, _mm256_shuffle_epi8(firsts.steps[t], code));
      second = _mm256_xor_si256(second, _mm256_shuffle_epi8(seconds.steps[t], code));
    }
    store_bytes(fields, _mm256_unpacklo_epi8(first, second));
    store_bytes(fields + kBytes, _mm256_unpackhi_epi8(first, second));
  }
}
} // namespace avx2
#undef FASTLOSS_WORD

namespace avx512vbmi {
// Byte 8 q + k: where the k-th of the 7 bytes of codes 8 q .. 8 q + 7 lies.
alignas(64) constexpr uint8_t kSevens[64] = {0,  1,  2,  3,  4,  5,  6,  7,  7,  8,  9,  10, 11, 12, 13, 14,
                                             14, 15, 16, 17, 18, 19, 20, 21, 21, 22, 23, 24, 25, 26, 27, 28,
                                             28, 29, 30, 31, 32, 33, 34, 35, 35, 36, 37, 38, 39, 40, 41, 42,
                                             42, 43, 44, 45, 46, 47, 48, 49, 49, 50, 51, 52, 53, 54, 55, 56};

[[maybe_unused]] __attribute__((target(FASTLOSS_AVX512_BYTES))) static void
p7_fields(const uint8_t *table, const uint8_t *codes, int64_t groups, uint8_t *fields) {
  const Bytes low_first = load_bytes(table), high_first = load_bytes(table + 64);
  const Bytes low_second = load_bytes(table + 128), high_second = load_bytes(table + 192);
  const Bytes sevens = load_bytes(kSevens), shifts = _mm512_set1_epi64(0x312a231c150e0700); // bits 0, 7, ..., 49
  for (int64_t i = 0; i < groups; ++i, codes += kP7GroupBytes, fields += kLosslessGroup) {
    // A byte's top bit is the next code's; the look-ups do not see it.
    const Bytes code = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(sevens, load_bytes(codes)));
    const Bytes first = _mm512_permutex2var_epi8(low_first, code, high_first);
    const Bytes second = _mm512_permutex2var_epi8(low_second, code, high_second);
    Bytes begin, end;
    interleave(first, second, begin, end);
    store_bytes(fields, begin), store_bytes(fields + kBytes, end);
  }
}
} // namespace avx512vbmi
#endif

} // namespace fastloss
