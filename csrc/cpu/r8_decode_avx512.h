// R8 decoded with AVX-512: the 32 states of a block are one register, and two blocks share the look-ups.
#pragma once
#ifdef __x86_64__
#include "byte_look_up.h"
#include "r8_streams.h"

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

  static bool takes(const RansTable &table) { return table.symbols <= 64; }
  FASTLOSS_VBMI_INLINE static FewSymbols of(const RansTable &table) {
    alignas(64) uint8_t numbers[kSlots], rows[3][64] = {};
    int number = -1;
    for (int slot = 0; slot < kSlots; ++slot) {
      if (table.bias[slot] == 0) {
        ++number;
        rows[0][number] = table.symbol[slot], rows[1][number] = table.frequency[slot], rows[2][number] = uint8_t(slot);
      }
      numbers[slot] = uint8_t(number);
    }
    return {load_bytes(numbers), _mm512_load_si512(rows[0]), _mm512_load_si512(rows[1]), _mm512_load_si512(rows[2])};
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

// The literals of two blocks by their steps' escapes: lanes of the first and the second take turns.
FASTLOSS_VBMI static void expand_all_literals(RansStream *streams, const uint64_t *escapes, int64_t steps, uint8_t *out,
                                              int64_t stride) {
  for (int64_t first = 0; first < steps; first += 8) {
    uint32_t some = _mm512_test_epi64_mask(_mm512_load_si512(escapes + first), _mm512_load_si512(escapes + first));
    if (steps - first < 8) some &= (1u << (steps - first)) - 1;
    for (; some; some &= some - 1) {
      const int64_t step = first + _tzcnt_u32(some);
      expand_literals(streams[0], uint32_t(_pext_u64(escapes[step], 0x5555555555555555)), out + step * kRansLanes);
      expand_literals(streams[1], uint32_t(_pext_u64(escapes[step], 0xaaaaaaaaaaaaaaaa)),
                      out + stride + step * kRansLanes);
    }
  }
}

// 2 kPairs blocks, `stride` apart in `out`. The steps have no branches: literals are filled in behind them.
template <class Table, int kPairs>
FASTLOSS_VBMI void decode_pairs(const Table &table, int first_escape_slot, RansStream *streams, int64_t steps,
                                uint8_t *out, int64_t stride) {
  const __m512i low_bytes = _mm512_set1_epi16(0x00ff), high_bytes = _mm512_set1_epi16(int16_t(0xff00));
  const __m512i first_escape = _mm512_set1_epi8(char(first_escape_slot));
  alignas(64) uint64_t escapes[kPairs][kLosslessBlock / kRansLanes];
  alignas(64) uint8_t twice_index[64], apart_index[64];
  for (int i = 0; i < 64; ++i) twice_index[i] = uint8_t(i / 2), apart_index[i] = uint8_t(2 * i % 64 + i / 32);
  const __m512i twice = _mm512_load_si512(twice_index), apart = _mm512_load_si512(apart_index);
  __m512i x[2 * kPairs];
  const uint8_t *cursor[2 * kPairs], *end[2 * kPairs];
  for (int b = 0; b < 2 * kPairs; ++b)
    x[b] = _mm512_loadu_si512(streams[b].begin), cursor[b] = streams[b].cursor, end[b] = streams[b].end;
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
      _store_mask64((__mmask64 *)&escapes[p][step], _mm512_cmpge_epu8_mask(slots, first_escape));
      a = _mm512_add_epi16(_mm512_mullo_epi16(_mm512_srli_epi16(a, 8), _mm512_and_si512(s.frequency, low_bytes)),
                           _mm512_and_si512(s.bias, low_bytes));
      b = _mm512_add_epi16(
          _mm512_mulhi_epu16(_mm512_and_si512(b, high_bytes), _mm512_and_si512(s.frequency, high_bytes)),
          _mm512_srli_epi16(s.bias, 8));
      a = take_bytes(a, twice, high_bytes, cursor[2 * p], end[2 * p]);
      b = take_bytes(b, twice, high_bytes, cursor[2 * p + 1], end[2 * p + 1]);
    }
  }
  for (int p = 0; p < kPairs; ++p)
    expand_all_literals(streams + 2 * p, escapes[p], steps, out + 2 * p * stride, stride);
}

// Pairs side by side while there are enough blocks; only a plane's last block can be shorter than the others.
template <class Table>
FASTLOSS_VBMI void decode_with(const RansTable &slots, RansStream *streams, int count, uint8_t *out) {
  const Table table = Table::of(slots);
  const int escape = slots.first_escape;
  int b = 0;
  for (; count - b >= 8; b += 8)
    decode_pairs<Table, 4>(table, escape, streams + b, streams[b].steps, out + b * kLosslessBlock, kLosslessBlock);
  for (; count - b >= 4; b += 4)
    decode_pairs<Table, 2>(table, escape, streams + b, streams[b].steps, out + b * kLosslessBlock, kLosslessBlock);
  for (; count - b >= 2; b += 2)
    decode_pairs<Table, 1>(table, escape, streams + b, streams[b].steps, out + b * kLosslessBlock, kLosslessBlock);
  if (b == count) return;
  // A block without a partner is its own: it is decoded twice, to the same place.
  RansStream twins[2] = {streams[b], streams[b]};
  decode_pairs<Table, 1>(table, escape, twins, twins[0].steps, out + b * kLosslessBlock, 0);
}

void decode(const RansTable &table, RansStream *streams, int count, uint8_t *out) {
  if (FewSymbols::takes(table)) return decode_with<FewSymbols>(table, streams, count, out);
  decode_with<ManySymbols>(table, streams, count, out);
}

} // namespace
} // namespace avx512
} // namespace fastloss
#endif
