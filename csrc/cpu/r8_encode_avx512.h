// R8 encoded with AVX-512: the 32 states of a block are one register, the last lane first, as RansBlock's stream is.
#pragma once
#ifdef __x86_64__
#include "byte_look_up.h"
#include "r8_symbols.h"

namespace fastloss {
namespace avx512 {
namespace {

// With 2^(L-1) < f <= 2^L and k = 15 + L, x / f = (x + nudge) factor >> 16 >> shift for all x < 256 f, shift = L - 1:
// factor is 2^k / f rounded up and nudge 0 where that is exact (256 f e < 2^k, f factor = 2^k + e), else 2^k / f
// rounded down and nudge 1. One of the two always is, since the two errors sum to f.
struct Division {
  uint16_t factor, shift, nudge;
};

inline Division division_by(uint32_t f) {
  if (f == 1) return {65535, 0, 1};
  uint16_t shift = 0;
  while (2u << shift < f) ++shift;
  const uint32_t power = 1u << (16 + shift), factor = (power + f - 1) / f;
  if (256 * f * (factor * f - power) < power) return {uint16_t(factor), shift, 0};
  return {uint16_t(factor - 1), shift, 1};
}

// Up to 63 bytes that are kept and the escape: symbols have numbers, which look up words.
struct Encoder {
  static constexpr int kSymbols = 64;
  alignas(64) uint8_t number[256];
  alignas(64) uint16_t factor[kSymbols] = {}, shift[kSymbols] = {}, rest[kSymbols] = {};
  int count = 0; // of symbols; the last one is the escape

  static bool takes(const RansSymbols &known) {
    int kept = 0;
    for (int s = 0; s < kEscape; ++s) kept += known.frequency[s] > 0;
    return kept < kSymbols && has_byte_look_ups();
  }

  explicit Encoder(const RansSymbols &known) {
    for (int s = 0; s <= kEscape; ++s) {
      const int f = known.frequency[s];
      if (s < kEscape) number[s] = uint8_t(count);
      if (!f) continue;
      const Division division = division_by(uint32_t(f));
      factor[count] = uint16_t((division.factor & 0x7fff) | division.nudge << 15); // the top bit of all factors is 1
      shift[count] = division.shift;
      rest[count] = uint16_t((256 - f) << 8 | known.start[s]);
      ++count;
    }
    for (int s = 0; s < kEscape; ++s)
      if (!known.frequency[s]) number[s] = uint8_t(count - 1);
  }

  void encode(const uint8_t *bytes, int64_t steps, RansBlock &block) const {
    if (count <= 32) return encode_with<false>(bytes, steps, block);
    encode_with<true>(bytes, steps, block);
  }

  // The stream turned round, written in whole vectors.
  FASTLOSS_VBMI static void append(const RansBlock &block, uint8_t *out) {
    alignas(64) uint8_t order[64];
    for (int i = 0; i < 64; ++i) order[i] = uint8_t(63 - i);
    const __m512i reversed = _mm512_load_si512(order);
    const uint8_t *end = block.stream() + block.streamed;
    for (int64_t i = 0; i < block.streamed; i += 64)
      _mm512_storeu_si512(out + i, _mm512_permutexvar_epi8(reversed, _mm512_loadu_si512(end - i - 64)));
  }

private:
  template <bool kMany> struct Words {
    __m512i part[2];

    FASTLOSS_VBMI_INLINE explicit Words(const uint16_t *words)
        : part{_mm512_load_si512(words), _mm512_load_si512(words + 32)} {}
    FASTLOSS_VBMI_INLINE __m512i at(__m512i index) const {
      if constexpr (kMany) return _mm512_permutex2var_epi16(part[0], index, part[1]);
      return _mm512_permutexvar_epi16(index, part[0]);
    }
  };

  template <bool kMany> FASTLOSS_VBMI void encode_with(const uint8_t *bytes, int64_t steps, RansBlock &block) const {
    const Bytes256 numbers = load_bytes(number);
    const Words<kMany> factors(factor), shifts(shift), rests(rest);
    const __m512i high_bytes = _mm512_set1_epi16(int16_t(0xff00)), low_bytes = _mm512_set1_epi16(0x00ff);
    const __m512i top = _mm512_set1_epi16(int16_t(0x8000)), escape = _mm512_set1_epi8(char(count - 1));
    alignas(64) uint8_t turned[64];
    alignas(64) uint16_t lanes[32];
    for (int i = 0; i < 32; ++i)
      turned[2 * i] = uint8_t(63 - i), turned[2 * i + 1] = uint8_t(31 - i), lanes[i] = uint16_t(31 - i);
    const __m512i order = _mm512_load_si512(turned);
    __m512i x = _mm512_set1_epi16(256);
    uint8_t *stream = block.stream(), *literal = block.literals;

    const auto step = [&](__m512i symbols) FASTLOSS_VBMI_LAMBDA {
      const __m512i factor = factors.at(symbols), rest = rests.at(symbols);
      const __m512i full = _mm512_sub_epi16(_mm512_setzero_si512(), _mm512_and_si512(rest, high_bytes));
      const __mmask32 emit = _mm512_cmpge_epu16_mask(x, full);
      const __m512i low = _mm512_maskz_compress_epi8(_pdep_u64(emit, 0x5555555555555555), x);
      _mm256_storeu_si256((__m256i *)stream, _mm512_castsi512_si256(low));
      stream += _mm_popcnt_u32(emit);
      x = _mm512_mask_srli_epi16(x, emit, x, 8);
      const __m512i nudged = _mm512_add_epi16(x, _mm512_srli_epi16(factor, 15));
      const __m512i product = _mm512_mulhi_epu16(nudged, _mm512_or_si512(factor, top));
      const __m512i quotient = _mm512_srlv_epi16(product, shifts.at(symbols));
      const __m512i more = _mm512_mullo_epi16(quotient, _mm512_srli_epi16(rest, 8));
      x = _mm512_add_epi16(_mm512_add_epi16(x, _mm512_and_si512(rest, low_bytes)), more);
    };

    // Two steps at a time, the later one in the low byte of each word; of an odd number the last stands alone.
    for (int64_t at = (steps - 1) / 2 * 64; at >= 0; at -= 64) {
      const bool alone = at + kRansLanes == steps * kRansLanes;
      const __m512i raw = _mm512_loadu_si512(bytes + at), symbols = look_up(numbers, raw);
      uint64_t escapes = _mm512_cmpeq_epi8_mask(symbols, escape);
      if (alone) escapes &= 0xffffffff;
      for (; escapes; escapes &= ~(uint64_t(1) << (63 - _lzcnt_u64(escapes))))
        *literal++ = bytes[at + 63 - int64_t(_lzcnt_u64(escapes))];
      const __m512i pairs = _mm512_permutexvar_epi8(order, symbols);
      if (!alone) step(pairs);
      step(_mm512_srli_epi16(pairs, 8));
    }
    _mm512_storeu_si512(block.states, _mm512_permutexvar_epi16(_mm512_load_si512(lanes), x));
    block.streamed = stream - block.stream(), block.escaped = literal - block.literals;
  }
};

} // namespace
} // namespace avx512
} // namespace fastloss
#endif
