// R8 to bf16 with AVX-512: while eight blocks take a step, what a step of the piece before gave is merged with signs
// and mantissas, a line of each block. The steps are bound by the vector units and the lines by memory.
#pragma once
#ifdef __x86_64__
#include "r8_decode_avx512.h"
#include "r8_decode_bf16.h"

namespace fastloss {
namespace avx512 {
namespace {

// Fields as the steps left them, two blocks taking turns, and where they go.
struct Merge {
  const uint8_t *fields, *plane; // the plane of the first block
  BlockLines cached, streamed;
};

// What step `step` gave to blocks 2 pair and 2 pair + 1.
template <bool kCached, bool kStreamed>
FASTLOSS_VBMI_INLINE void merge_step(const StepConstants &k, const Merge &m, int64_t step, int64_t pair) {
  const __m512i beside = _mm512_set1_epi16(int16_t(0x807f)); // the bits of sign and mantissa
  const auto line = [&](const uint8_t *bytes, __m512i fields) FASTLOSS_VBMI_LAMBDA {
    const __m512i loaded = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)bytes));
    return _mm512_ternarylogic_epi64(beside, _mm512_permutexvar_epi8(k.twice, loaded), fields, 0xca);
  };
  const auto put = [&](int64_t block, __m512i numbers) FASTLOSS_VBMI_LAMBDA {
    if (kCached) _mm512_store_si512((__m512i *)(m.cached.of(block) + step * 64), numbers);
    if (kStreamed) _mm512_stream_si512((__m512i *)(m.streamed.of(block) + step * 64), numbers);
  };
  const __m512i fields = _mm512_load_si512(m.fields + (step * kRansBlocks / 2 + pair) * 64);
  const uint8_t *plane = m.plane + 2 * pair * kLosslessBlock + step * kRansLanes;
  put(2 * pair, line(plane, _mm512_slli_epi16(fields, 7)));
  put(2 * pair + 1, line(plane + kLosslessBlock, _mm512_srli_epi16(fields, 1)));
}

constexpr int64_t kPieceSteps = RansBf16::kPiece / kRansLanes;

template <class Table, bool kCached, bool kStreamed>
FASTLOSS_VBMI void decode_piece(const RansTable &slots, RansBlocks &blocks, uint8_t *fields, const Merge &merge) {
  constexpr int kPairs = int(kRansBlocks) / 2;
  const Table table = Table::of(slots);
  const StepConstants constants(slots.first_escape);
  alignas(64) uint64_t escapes[kPieceSteps * kPairs]; // of two blocks: their lanes take turns
  RansStream *streams = blocks.streams;
  __m512i x[2 * kPairs];
  const uint8_t *cursor[2 * kPairs], *end[2 * kPairs];
  for (int b = 0; b < 2 * kPairs; ++b)
    x[b] = _mm512_load_si512(blocks.states[b]), cursor[b] = streams[b].cursor, end[b] = streams[b].end;
  for (int64_t s = 0; s < kPieceSteps; ++s) {
#pragma GCC unroll 4
    for (int p = 0; p < kPairs; ++p) {
      const int64_t e = s * kPairs + p;
      _mm512_store_si512(fields + e * 64, step(table, constants, x + 2 * p, cursor + 2 * p, end + 2 * p, &escapes[e]));
      if (kCached || kStreamed) merge_step<kCached, kStreamed>(constants, merge, s, p);
    }
  }
  for (int b = 0; b < 2 * kPairs; ++b) _mm512_store_si512(blocks.states[b], x[b]), streams[b].cursor = cursor[b];
  for (int64_t i = 0; i < kPieceSteps * kPairs; i += 64)
    for (uint64_t some = steps_with_escapes(escapes + i, 64); some; some &= some - 1) {
      const int64_t e = i + int64_t(_tzcnt_u64(some)), pair = e % kPairs;
      expand_literals(streams[2 * pair], escapes[e] & 0x5555555555555555, fields + e * 64);
      expand_literals(streams[2 * pair + 1], escapes[e] & 0xaaaaaaaaaaaaaaaa, fields + e * 64);
    }
}

template <bool kCached, bool kStreamed>
void decode_piece_of(const RansTable &table, RansBlocks &blocks, uint8_t *fields, const Merge &merge) {
  if (table.symbols <= RansTable::kFewSymbols)
    decode_piece<FewSymbols, kCached, kStreamed>(table, blocks, fields, merge);
  else decode_piece<ManySymbols, kCached, kStreamed>(table, blocks, fields, merge);
}

void decode_fields(const RansTable &table, RansBlocks &blocks, uint8_t *fields) {
  decode_piece_of<false, false>(table, blocks, fields, {});
}

// Without `fields` there is no piece behind the one that is merged.
template <bool kCached, bool kStreamed>
FASTLOSS_VBMI void decode_and_merge(const RansTable &table, RansBlocks &blocks, uint8_t *fields, const Merge &merge) {
  if (fields) return decode_piece_of<kCached, kStreamed>(table, blocks, fields, merge);
  const StepConstants constants(0);
  for (int64_t s = 0; s < kPieceSteps; ++s)
    for (int64_t p = 0; p < kRansBlocks / 2; ++p) merge_step<kCached, kStreamed>(constants, merge, s, p);
}

} // namespace
} // namespace avx512
} // namespace fastloss
#endif
