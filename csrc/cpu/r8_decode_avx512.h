// R8 decoded with AVX-512: the 32 states of a block are one register, and two blocks share the look-ups.
#pragma once
#ifdef __x86_64__
#include "byte_look_up.h"
#include "r8_literals.h"

namespace fastloss {
namespace avx512 {
namespace {

// What 64 slots stand for.
struct Slots {
  __m512i symbol, frequency, bias;
};

// Up to 64 symbols: one look-up of 256 names the symbol's number, which fits a single permutation each.
struct FewSymbols {
  Bytes256 number;
  __m512i symbol, frequency, first;

  FASTLOSS_VBMI_INLINE static FewSymbols of(const RansTable &table) {
    return {load_bytes(table.number), _mm512_load_si512(table.symbol_of), _mm512_load_si512(table.frequency_of),
            _mm512_load_si512(table.first_of)};
  }
  FASTLOSS_VBMI_INLINE static Slots look_up(const FewSymbols &t, __m512i slots) {
    const __m512i number = fastloss::look_up(t.number, slots);
    return {_mm512_permutexvar_epi8(number, t.symbol), _mm512_permutexvar_epi8(number, t.frequency),
            _mm512_sub_epi8(slots, _mm512_permutexvar_epi8(number, t.first))};
  }
};

struct ManySymbols {
  Bytes256 symbol, frequency, bias;

  FASTLOSS_VBMI_INLINE static ManySymbols of(const RansTable &table) {
    return {load_bytes(table.symbol), load_bytes(table.frequency), load_bytes(table.bias)};
  }
  FASTLOSS_VBMI_INLINE static Slots look_up(const ManySymbols &t, __m512i slots) {
    return {fastloss::look_up(t.symbol, slots), fastloss::look_up(t.frequency, slots),
            fastloss::look_up(t.bias, slots)};
  }
};

// What all steps need.
struct StepConstants {
  __m512i low_bytes, high_bytes, first_escape, twice; // twice: byte i / 2

  FASTLOSS_VBMI_INLINE explicit StepConstants(int first_escape_slot)
      : low_bytes(_mm512_set1_epi16(0x00ff)), high_bytes(_mm512_set1_epi16(int16_t(0xff00))),
        first_escape(_mm512_set1_epi8(char(first_escape_slot))) {
    alignas(64) uint8_t index[64];
    for (int i = 0; i < 64; ++i) index[i] = uint8_t(i / 2);
    twice = _mm512_load_si512(index);
  }
};

// The states that fell below 256 take the stream's next bytes.
FASTLOSS_VBMI_INLINE __m512i take_bytes(const StepConstants &k, __m512i x, const uint8_t *&cursor, const uint8_t *end) {
  constexpr int kAhead = 192; // bytes: eight short streams are too many for the processor's own prefetchers
  _mm_prefetch(reinterpret_cast<const char *>(cursor) + kAhead, _MM_HINT_T0);
  const __mmask32 need = _mm512_testn_epi16_mask(x, k.high_bytes);
  const __m512i next = _mm512_permutexvar_epi8(k.twice, _mm512_loadu_si512(cursor));
  const __m512i bytes = _mm512_maskz_expand_epi16(need, next);
  cursor = std::min(cursor + _mm_popcnt_u32(need), end);
  return _mm512_mask_shldi_epi16(x, need, x, bytes, 8);
}

// A step of two blocks, whose bytes take turns in the symbols that are returned and in the mask of escapes.
template <class Table>
FASTLOSS_VBMI_INLINE __m512i step(const Table &table, const StepConstants &k, __m512i *x, const uint8_t **cursor,
                                  const uint8_t *const *end, uint64_t *escapes) {
  const __m512i slots = _mm512_ternarylogic_epi64(k.low_bytes, x[0], _mm512_slli_epi16(x[1], 8), 0xea);
  const Slots s = Table::look_up(table, slots);
  _store_mask64((__mmask64 *)escapes, _mm512_cmpge_epu8_mask(slots, k.first_escape));
  const __m512i first = _mm512_mullo_epi16(_mm512_srli_epi16(x[0], 8), _mm512_and_si512(s.frequency, k.low_bytes));
  const __m512i second =
      _mm512_mulhi_epu16(_mm512_and_si512(x[1], k.high_bytes), _mm512_and_si512(s.frequency, k.high_bytes));
  x[0] = _mm512_add_epi16(first, _mm512_and_si512(s.bias, k.low_bytes));
  x[1] = _mm512_add_epi16(second, _mm512_srli_epi16(s.bias, 8));
  x[0] = take_bytes(k, x[0], cursor[0], end[0]);
  x[1] = take_bytes(k, x[1], cursor[1], end[1]);
  return s.symbol;
}

// The escaped bytes of a step, up to 32, as read_literals.
FASTLOSS_VBMI_INLINE void expand_literals(RansStream &stream, __mmask64 lanes, uint8_t *out) {
  if (stream.literal - stream.begin < 32) return read_literals(stream, lanes, out);
  const __m256i turn = _mm256_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22,
                                       23, 24, 25, 26, 27, 28, 29, 30, 31);
  const __m256i next = _mm256_permutexvar_epi8(turn, _mm256_loadu_si256((const __m256i *)(stream.literal - 32)));
  _mm512_mask_storeu_epi8(out, lanes, _mm512_maskz_expand_epi8(lanes, _mm512_castsi256_si512(next)));
  stream.literal -= _mm_popcnt_u64(lanes);
}

// Of 64 steps of two blocks at most: bit e of the result says whether step e has escapes.
FASTLOSS_VBMI_INLINE uint64_t steps_with_escapes(const uint64_t *escapes, int64_t count) {
  uint64_t some = 0;
  for (int64_t i = 0; i < count; i += 8) {
    const __m512i eight = _mm512_load_si512(escapes + i);
    some |= uint64_t(_mm512_test_epi64_mask(eight, eight)) << i;
  }
  return count < 64 ? _bzhi_u64(some, uint32_t(count)) : some;
}

// `steps` of 2 kPairs blocks from `first` on, `stride` apart in `out`. The steps have no branches: literals are filled
// in behind them.
template <class Table, int kPairs>
FASTLOSS_VBMI void decode_pairs(const Table &table, int first_escape_slot, RansBlocks &blocks, int64_t first,
                                int64_t steps, uint8_t *out, int64_t stride) {
  const StepConstants constants(first_escape_slot);
  alignas(64) uint64_t escapes[kPairs * kLosslessBlock / kRansLanes]; // of two blocks: their lanes take turns
  alignas(64) uint8_t apart_index[64];
  for (int i = 0; i < 64; ++i) apart_index[i] = uint8_t(2 * i % 64 + i / 32);
  const __m512i apart = _mm512_load_si512(apart_index);
  RansStream *streams = blocks.streams + first;
  uint16_t (*states)[kRansLanes] = blocks.states + first;
  out += first * stride;
  __m512i x[2 * kPairs];
  const uint8_t *cursor[2 * kPairs], *end[2 * kPairs];
  for (int b = 0; b < 2 * kPairs; ++b)
    x[b] = _mm512_load_si512(states[b]), cursor[b] = streams[b].cursor, end[b] = streams[b].end;
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 4
    for (int p = 0; p < kPairs; ++p) {
      uint8_t *at = out + 2 * p * stride + s * kRansLanes;
      const __m512i symbols = _mm512_permutexvar_epi8(
          apart, step(table, constants, x + 2 * p, cursor + 2 * p, end + 2 * p, &escapes[s * kPairs + p]));
      _mm256_store_si256((__m256i *)at, _mm512_castsi512_si256(symbols));
      _mm256_store_si256((__m256i *)(at + stride), _mm512_extracti64x4_epi64(symbols, 1));
    }
  }
  for (int b = 0; b < 2 * kPairs; ++b) _mm512_store_si512(states[b], x[b]), streams[b].cursor = cursor[b];
  for (int64_t i = 0; i < steps * kPairs; i += 64)
    for (uint64_t some = steps_with_escapes(escapes + i, std::min<int64_t>(64, steps * kPairs - i)); some;
         some &= some - 1) {
      const int64_t e = i + int64_t(_tzcnt_u64(some)), pair = e % kPairs;
      uint8_t *at = out + 2 * pair * stride + e / kPairs * kRansLanes;
      expand_literals(streams[2 * pair], uint32_t(_pext_u64(escapes[e], 0x5555555555555555)), at);
      expand_literals(streams[2 * pair + 1], uint32_t(_pext_u64(escapes[e], 0xaaaaaaaaaaaaaaaa)), at + stride);
    }
}

template <class Table>
FASTLOSS_VBMI void decode_with(const RansTable &slots, RansBlocks &blocks, int64_t steps, uint8_t *out,
                               int64_t stride) {
  const Table table = Table::of(slots);
  const int escape = slots.first_escape;
  const int64_t count = (blocks.count + 1) / 2 * 2;
  int64_t b = 0;
  for (; count - b >= 8; b += 8) decode_pairs<Table, 4>(table, escape, blocks, b, steps, out, stride);
  for (; count - b >= 4; b += 4) decode_pairs<Table, 2>(table, escape, blocks, b, steps, out, stride);
  for (; count - b >= 2; b += 2) decode_pairs<Table, 1>(table, escape, blocks, b, steps, out, stride);
}

[[maybe_unused]] void decode(const RansTable &table, RansBlocks &blocks, int64_t steps, uint8_t *out, int64_t stride) {
  if (table.symbols <= RansTable::kFewSymbols) decode_with<FewSymbols>(table, blocks, steps, out, stride);
  else decode_with<ManySymbols>(table, blocks, steps, out, stride);
}

} // namespace
} // namespace avx512
} // namespace fastloss
#endif
