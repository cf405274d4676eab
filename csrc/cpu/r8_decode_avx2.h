// R8 decoded with AVX2: eight states a register, 32 bits each, and one gather for what their slots stand for.
#pragma once
#ifdef __x86_64__
#include "r8_streams.h"
#include "simd.h"

namespace fastloss {
namespace avx2 {
namespace {

#define FASTLOSS_AVX2 __attribute__((target("avx2,popcnt")))
#define FASTLOSS_AVX2_INLINE __attribute__((target("avx2,popcnt"), always_inline)) inline

// Where each of eight lanes finds its byte among the next eight, by the mask of lanes that need one: a number of four
// bits a lane.
struct Places {
  uint32_t of[256];

  Places() {
    for (int mask = 0; mask < 256; ++mask) {
      uint32_t places = 0;
      for (int lane = 0, next = 0; lane < 8; ++lane)
        if (mask >> lane & 1) places |= uint32_t(next++) << 4 * lane;
      of[mask] = places;
    }
  }
};

// Eight states take a step; their slots' entries (frequency, bias, symbol, escape: a byte each) are returned.
FASTLOSS_AVX2_INLINE __m256i step(__m256i &x, const int *entries, const Places &places, const uint8_t *&cursor) {
  const __m256i low = _mm256_set1_epi32(255);
  const __m256i entry = _mm256_i32gather_epi32(entries, _mm256_and_si256(x, low), 4);
  // frequency (x >> 8) fits 16 bits, and so the upper halves of both factors are 0
  const __m256i scaled = _mm256_mullo_epi16(_mm256_and_si256(entry, low), _mm256_srli_epi32(x, 8));
  const __m256i after = _mm256_add_epi32(scaled, _mm256_and_si256(_mm256_srli_epi32(entry, 8), low));
  const __m256i need = _mm256_cmpgt_epi32(_mm256_set1_epi32(256), after);
  const uint32_t mask = uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(need)));
  const __m256i next = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)cursor));
  const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(int(places.of[mask])),
                                          _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28)); // its low three bits count
  const __m256i bytes = _mm256_permutevar8x32_epi32(next, index);
  x = _mm256_blendv_epi8(after, _mm256_or_si256(_mm256_slli_epi32(after, 8), bytes), need);
  cursor += _mm_popcnt_u32(mask);
  return entry;
}

// Two blocks side by side; `out` may be the same, and then both streams are.
FASTLOSS_AVX2 void decode_two(const int *entries, RansStream *streams, int64_t steps, uint8_t *const *out) {
  static const Places places;
  __m256i x[2][4];
  for (int b = 0; b < 2; ++b)
    for (int part = 0; part < 4; ++part)
      x[b][part] = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(streams[b].begin + 16 * part)));
  const uint8_t *cursor[2] = {streams[0].cursor, streams[1].cursor};
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7), low = _mm256_set1_epi32(255);
  for (int64_t at = 0; at < steps * kRansLanes; at += kRansLanes) {
    uint32_t escapes[2];
#pragma GCC unroll 2
    for (int b = 0; b < 2; ++b) {
      __m256i entry[4];
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) entry[part] = step(x[b][part], entries, places, cursor[b]);
      cursor[b] = std::min(cursor[b], streams[b].end);
      __m256i flag[4];
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        const __m256i upper = _mm256_srli_epi32(entry[part], 16);
        entry[part] = _mm256_and_si256(upper, low), flag[part] = _mm256_srli_epi32(upper, 8);
      }
      const auto bytes = [&](const __m256i *words) __attribute__((target("avx2,popcnt"), always_inline)) {
        const __m256i packed =
            _mm256_packus_epi16(_mm256_packus_epi32(words[0], words[1]), _mm256_packus_epi32(words[2], words[3]));
        return _mm256_permutevar8x32_epi32(packed, order);
      };
      _mm256_storeu_si256((__m256i *)(out[b] + at), bytes(entry));
      escapes[b] = uint32_t(_mm256_movemask_epi8(bytes(flag)));
    }
    if (__builtin_expect(escapes[0] | escapes[1], 0))
      for (int b = 0; b < 2; ++b) read_literals(streams[b], escapes[b], out[b] + at);
  }
}

FASTLOSS_AVX2 void decode(const RansTable &table, const RansStream *streams, int count, uint8_t *out) {
  int entries[kSlots];
  for (int s = 0; s < kSlots; ++s)
    entries[s] = int(uint32_t(table.frequency[s]) | uint32_t(table.bias[s]) << 8 | uint32_t(table.symbol[s]) << 16 |
                     (s >= table.first_escape ? 0x80000000u : 0));
  for (int b = 0; b < count; b += 2) {
    const int other = std::min(b + 1, count - 1); // a block without a partner is its own
    RansStream two[2] = {streams[b], streams[other]};
    uint8_t *const rows[2] = {out + b * kLosslessBlock, out + other * kLosslessBlock};
    decode_two(entries, two, two[0].steps, rows);
  }
}

#undef FASTLOSS_AVX2
#undef FASTLOSS_AVX2_INLINE

} // namespace
} // namespace avx2
} // namespace fastloss
#endif
