// R8 decoded with AVX2: eight states a register, 32 bits each, and one gather for what their slots stand for.
#pragma once
#ifdef __x86_64__
#include "r8_literals.h"
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

FASTLOSS_AVX2 void decode_two(const int *entries, RansBlocks &blocks, int64_t first, int64_t steps, uint8_t *out,
                              int64_t stride) {
  static const Places places;
  __m256i x[2][4];
  const uint8_t *cursor[2];
  uint8_t *const rows[2] = {out + first * stride, out + (first + 1) * stride};
  RansStream *streams = blocks.streams + first;
  uint16_t (*states)[kRansLanes] = blocks.states + first;
  for (int b = 0; b < 2; ++b) {
    for (int part = 0; part < 4; ++part)
      x[b][part] = _mm256_cvtepu16_epi32(_mm_load_si128((const __m128i *)(states[b] + 8 * part)));
    cursor[b] = streams[b].cursor;
  }
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
      _mm256_store_si256((__m256i *)(rows[b] + at), bytes(entry));
      escapes[b] = uint32_t(_mm256_movemask_epi8(bytes(flag)));
    }
    if (__builtin_expect(escapes[0] | escapes[1], 0))
      for (int b = 0; b < 2; ++b) read_literals(streams[b], escapes[b], rows[b] + at);
  }
  for (int b = 0; b < 2; ++b) {
    for (int half = 0; half < 2; ++half) {
      const __m256i packed = _mm256_packus_epi32(x[b][2 * half], x[b][2 * half + 1]);
      _mm256_store_si256((__m256i *)(states[b] + 16 * half), _mm256_permute4x64_epi64(packed, 0xd8));
    }
    streams[b].cursor = cursor[b];
  }
}

FASTLOSS_AVX2 void decode(const RansTable &table, RansBlocks &blocks, int64_t steps, uint8_t *out, int64_t stride) {
  int entries[kSlots];
  for (int s = 0; s < kSlots; ++s)
    entries[s] = int(uint32_t(table.frequency[s]) | uint32_t(table.bias[s]) << 8 | uint32_t(table.symbol[s]) << 16 |
                     (s >= table.first_escape ? 0x80000000u : 0));
  for (int64_t b = 0; b < blocks.count; b += 2) decode_two(entries, blocks, b, steps, out, stride);
}

#undef FASTLOSS_AVX2
#undef FASTLOSS_AVX2_INLINE

} // namespace
} // namespace avx2
} // namespace fastloss
#endif
