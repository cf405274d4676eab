// R8 encoded with AVX-512: the 32 states of a block are one register, the last lane first, as RansBlock's stream is.
// One step waits for the one before it some 17 cycles but keeps the ports busy for 10: several blocks go side by side.
#pragma once
#ifdef __x86_64__
#include "byte_look_up.h"
#include "encoder_blocks.h"
#include "r8_symbols.h"

namespace fastloss {
namespace avx512 {
namespace {

// With 2^(L-1) < f <= 2^L and k = 15 + L, x / f = x factor >> 16 >> shift for all x < 256 f, shift = L - 1, where
// factor is 2^k / f rounded up: f factor = 2^k + e and 256 f e < 2^k, since e < f. That ends at f = 128. For the one
// frequency that may be larger it may be wrong, and then (x + 1) factor is right with 2^k / f rounded down, for all
// other f too.
struct Division {
  uint16_t factor, shift;

  Division(uint32_t f, bool up) : factor(65535), shift(0) { // f = 1: x + 1 gives x, and x gives x - 1
    if (f == 1) return;
    while (2u << shift < f) ++shift;
    const uint32_t power = 1u << (16 + shift), above = (power + f - 1) / f;
    factor = uint16_t(up ? above : above - 1);
  }

  static bool up_is_exact(uint32_t f) {
    constexpr uint32_t power = 1u << 23;
    return f <= 128 || 256 * f * ((power + f - 1) / f * f - power) < power;
  }
};

// Up to 63 bytes that are kept and the escape: symbols have numbers, which look up words.
class Encoder {
public:
  static constexpr int kTogether = 4; // blocks side by side
  static constexpr int kSymbols = 64, kNear = 64;

  static bool takes(const RansSymbols &known) {
    int kept = 0;
    for (int s = 0; s < kEscape; ++s) kept += known.frequency[s] > 0;
    return kept < kSymbols && has_byte_look_ups();
  }

  explicit Encoder(const RansSymbols &known) {
    bool up = true;
    for (int s = 0; s <= kEscape; ++s) up = up && Division::up_is_exact(uint32_t(known.frequency[s]));
    nudge_ = up ? 0 : 1;
    int lowest = kEscape;
    for (int s = 0; s <= kEscape; ++s) {
      const int f = known.frequency[s];
      if (s < kEscape) number_[s] = uint8_t(count_);
      if (!f) continue;
      if (s < kEscape) lowest = std::min(lowest, s), span_ = s - lowest;
      const Division division(uint32_t(f), up);
      factor_[count_] = division.factor, shift_[count_] = division.shift;
      full_[count_] = uint16_t(f << 8), times_[count_] = uint16_t(256 - f);
      start_[count_] = uint16_t(known.start[s] + (f == 1 && up ? 255 : 0));
      ++count_;
    }
    for (int s = 0; s < kEscape; ++s)
      if (!known.frequency[s]) number_[s] = uint8_t(count_ - 1);
    first_ = uint8_t(std::min(lowest, kEscape - 1));
    for (int i = 0; i < kNear; ++i) near_[i] = first_ + i < kEscape && i <= span_ ? number_[first_ + i] : count_ - 1;
  }

  // Blocks of whole steps; more than one only if they are full. Of a step every byte is read, of a block 32 more.
  void encode(const uint8_t *const *bytes, int64_t steps, RansBlock *blocks, int count, Ahead ahead) const {
    const bool few = count_ <= 32, near = span_ < kNear - 1 && !nudge_;
    if (count == kTogether) {
      if (few && near) encode_with<true, true, kTogether>(bytes, steps, blocks, ahead);
      else if (few) encode_with<true, false, kTogether>(bytes, steps, blocks, ahead);
      else encode_with<false, false, kTogether>(bytes, steps, blocks, ahead);
      return;
    }
    for (int b = 0; b < count; ++b)
      if (few) encode_with<true, false, 1>(bytes + b, steps, blocks + b, ahead);
      else encode_with<false, false, 1>(bytes + b, steps, blocks + b, ahead);
  }

  // The low bytes of the stream turned round, written in whole vectors.
  FASTLOSS_VBMI static void append(const RansBlock &block, uint8_t *out) {
    alignas(64) uint8_t order[64];
    for (int i = 0; i < 64; ++i) order[i] = uint8_t(i < 32 ? 62 - 2 * i : 64 + 126 - 2 * i);
    const __m512i turned = _mm512_load_si512(order);
    const uint16_t *end = block.stream() + block.streamed;
    for (int64_t i = 0; i < block.streamed; i += 64, end -= 64)
      _mm512_storeu_si512(out + i,
                          _mm512_permutex2var_epi8(_mm512_loadu_si512(end - 32), turned, _mm512_loadu_si512(end - 64)));
  }

private:
  alignas(64) uint8_t number_[256], near_[kNear]; // near_: of the bytes from first_ on
  alignas(64) uint16_t factor_[kSymbols] = {}, shift_[kSymbols] = {}, full_[kSymbols] = {}, times_[kSymbols] = {},
                       start_[kSymbols] = {};
  int count_ = 0, span_ = 0, nudge_; // of symbols, the last one is the escape; between the first and the last byte kept
  uint8_t first_;

  template <bool kFew> struct Words {
    __m512i part[2];

    FASTLOSS_VBMI_INLINE explicit Words(const uint16_t *words)
        : part{_mm512_load_si512(words), _mm512_load_si512(words + 32)} {}
    FASTLOSS_VBMI_INLINE __m512i at(__m512i index) const {
      if constexpr (kFew) return _mm512_permutexvar_epi16(index, part[0]);
      return _mm512_permutex2var_epi16(part[0], index, part[1]);
    }
  };

  // kIsNear: all bytes that are kept lie in near_, and there is no nudge.
  template <bool kFew, bool kIsNear, int kBlocks>
  FASTLOSS_VBMI void encode_with(const uint8_t *const *all_bytes, int64_t steps, RansBlock *blocks, Ahead ahead) const {
    const Words<kFew> factors(factor_), shifts(shift_), fulls(full_), times(times_), starts(start_);
    const Bytes256 numbers = load_bytes(number_);
    const __m512i near = _mm512_load_si512(near_), first = _mm512_set1_epi8(char(first_));
    const __m512i far = _mm512_set1_epi8(kNear - 1), escape = _mm512_set1_epi8(char(count_ - 1));
    const __m512i nudge = _mm512_set1_epi16(int16_t(nudge_));
    alignas(64) uint8_t turned[64], paired[64];
    alignas(64) uint16_t lanes[32];
    for (int i = 0; i < 64; ++i) turned[i] = uint8_t(63 - i), paired[i] = uint8_t((i & 1 ? 31 : 63) - i / 2);
    for (int i = 0; i < 32; ++i) lanes[i] = uint16_t(31 - i);
    const __m512i pairs = _mm512_load_si512(paired);
    __m512i states[kBlocks];
    uint16_t *streams[kBlocks];
    uint8_t *literals[kBlocks];
    for (int b = 0; b < kBlocks; ++b) {
      states[b] = _mm512_set1_epi16(256);
      streams[b] = blocks[b].stream(), literals[b] = blocks[b].literals;
    }

    const auto step = [&](__m512i &x, uint16_t *&stream, __m512i symbols) FASTLOSS_VBMI_LAMBDA {
      const __mmask32 emit = _mm512_cmpge_epu16_mask(x, fulls.at(symbols));
      _mm512_storeu_si512(stream, _mm512_maskz_compress_epi16(emit, x));
      stream += _mm_popcnt_u32(emit);
      x = _mm512_mask_srli_epi16(x, emit, x, 8);
      const __m512i dividend = kIsNear ? x : _mm512_add_epi16(x, nudge);
      const __m512i quotient = _mm512_srlv_epi16(_mm512_mulhi_epu16(dividend, factors.at(symbols)), shifts.at(symbols));
      x = _mm512_add_epi16(x, starts.at(symbols));
      x = _mm512_add_epi16(x, _mm512_mullo_epi16(quotient, times.at(symbols)));
    };

    // Two steps at a time, the later one in the low byte of each word; of an odd number the last stands alone.
    for (int64_t at = (steps - 1) / 2 * 64; at >= 0; at -= 64) {
      const bool alone = kBlocks == 1 && at + kRansLanes == steps * kRansLanes;
      ahead.some();
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; ++b) {
        const __m512i raw = _mm512_loadu_si512(all_bytes[b] + at);
        __m512i symbols;
        if constexpr (kIsNear)
          symbols = _mm512_permutexvar_epi8(_mm512_min_epu8(_mm512_sub_epi8(raw, first), far), near);
        else symbols = look_up(numbers, raw);
        if (_mm512_cmpeq_epi8_mask(symbols, escape)) {
          const __m512i order = _mm512_load_si512(turned);
          uint64_t escapes = _mm512_cmpeq_epi8_mask(_mm512_permutexvar_epi8(order, symbols), escape);
          if (alone) escapes &= ~uint64_t(0xffffffff);
          _mm512_storeu_si512(literals[b], _mm512_maskz_compress_epi8(escapes, _mm512_permutexvar_epi8(order, raw)));
          literals[b] += _mm_popcnt_u64(escapes);
        }
        symbols = _mm512_permutexvar_epi8(pairs, symbols);
        if (!alone) step(states[b], streams[b], symbols);
        step(states[b], streams[b], _mm512_srli_epi16(symbols, 8));
      }
    }
    for (int b = 0; b < kBlocks; ++b) {
      _mm512_storeu_si512(blocks[b].states, _mm512_permutexvar_epi16(_mm512_load_si512(lanes), states[b]));
      blocks[b].streamed = streams[b] - blocks[b].stream(), blocks[b].escaped = literals[b] - blocks[b].literals;
    }
  }
};

} // namespace
} // namespace avx512
} // namespace fastloss
#endif
