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

// The states that fell below 256 take the stream's next bytes.
FASTLOSS_VBMI_INLINE __m512i take_bytes(__m512i x, __m512i twice, __m512i high_bytes, const uint8_t *&cursor,
                                        const uint8_t *end) {
  const __mmask32 need = _mm512_testn_epi16_mask(x, high_bytes);
  const __m512i next = _mm512_permutexvar_epi8(twice, _mm512_loadu_si512(cursor)); // byte i in both halves of word i
  const __m512i bytes = _mm512_maskz_expand_epi16(need, next);
  cursor = std::min(cursor + _mm_popcnt_u32(need), end);
  return _mm512_mask_shldi_epi16(x, need, x, bytes, 8);
}

// The escaped bytes of a step, as read_literals.
FASTLOSS_VBMI static void expand_literals(RansStream &stream, __mmask32 lanes, uint8_t *out) {
  if (stream.literal - stream.begin < 32) return read_literals(stream, lanes, out);
  const __m256i turn = _mm256_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22,
                                       23, 24, 25, 26, 27, 28, 29, 30, 31);
  const __m256i next = _mm256_permutexvar_epi8(turn, _mm256_loadu_si256((const __m256i *)(stream.literal - 32)));
  _mm256_mask_storeu_epi8(out, lanes, _mm256_maskz_expand_epi8(lanes, next));
  stream.literal -= _mm_popcnt_u32(lanes);
}

// Steps of two blocks each, 64 at most: bit e of the result says whether step e has escapes.
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
  const __m512i low_bytes = _mm512_set1_epi16(0x00ff), high_bytes = _mm512_set1_epi16(int16_t(0xff00));
  const __m512i first_escape = _mm512_set1_epi8(char(first_escape_slot));
  alignas(64) uint64_t escapes[kPairs * kLosslessBlock / kRansLanes]; // of two blocks: their lanes take turns
  alignas(64) uint8_t twice_index[64], apart_index[64];
  for (int i = 0; i < 64; ++i) twice_index[i] = uint8_t(i / 2), apart_index[i] = uint8_t(2 * i % 64 + i / 32);
  const __m512i twice = _mm512_load_si512(twice_index), apart = _mm512_load_si512(apart_index);
  RansStream *streams = blocks.streams + first;
  uint16_t(*states)[kRansLanes] = blocks.states + first;
  out += first * stride;
  __m512i x[2 * kPairs];
  const uint8_t *cursor[2 * kPairs], *end[2 * kPairs];
  for (int b = 0; b < 2 * kPairs; ++b)
    x[b] = _mm512_load_si512(states[b]), cursor[b] = streams[b].cursor, end[b] = streams[b].end;
  for (int64_t step = 0; step < steps; ++step) {
    uint8_t *at = out + step * kRansLanes;
#pragma GCC unroll 4
    for (int p = 0; p < kPairs; ++p) {
      __m512i &a = x[2 * p], &b = x[2 * p + 1];
      // Bytes of the first block and the second take turns.
      const __m512i slots = _mm512_ternarylogic_epi64(low_bytes, a, _mm512_slli_epi16(b, 8), 0xea);
      const Slots s = Table::look_up(table, slots);
      const __m512i symbols = _mm512_permutexvar_epi8(apart, s.symbol);
      _mm256_store_si256((__m256i *)(at + 2 * p * stride), _mm512_castsi512_si256(symbols));
      _mm256_store_si256((__m256i *)(at + (2 * p + 1) * stride), _mm512_extracti64x4_epi64(symbols, 1));
      _store_mask64((__mmask64 *)&escapes[step * kPairs + p], _mm512_cmpge_epu8_mask(slots, first_escape));
      a = _mm512_add_epi16(_mm512_mullo_epi16(_mm512_srli_epi16(a, 8), _mm512_and_si512(s.frequency, low_bytes)),
                           _mm512_and_si512(s.bias, low_bytes));
      b = _mm512_add_epi16(
          _mm512_mulhi_epu16(_mm512_and_si512(b, high_bytes), _mm512_and_si512(s.frequency, high_bytes)),
          _mm512_srli_epi16(s.bias, 8));
      a = take_bytes(a, twice, high_bytes, cursor[2 * p], end[2 * p]);
      b = take_bytes(b, twice, high_bytes, cursor[2 * p + 1], end[2 * p + 1]);
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

void decode(const RansTable &table, RansBlocks &blocks, int64_t steps, uint8_t *out, int64_t stride) {
  if (table.symbols <= RansTable::kFewSymbols) decode_with<FewSymbols>(table, blocks, steps, out, stride);
  else decode_with<ManySymbols>(table, blocks, steps, out, stride);
}

} // namespace
} // namespace avx512
} // namespace fastloss
#endif
