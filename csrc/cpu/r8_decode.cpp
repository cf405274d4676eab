// docs/design.md, "The lossless contract": R8 decoded with 32 lanes a block, the cursor clamped after each step.
#include "r8_decode.h"
#include "bit_blocks.h"
#include "r8_decode_avx2.h"
#include "r8_decode_avx512.h"
#include "r8_streams.h"

namespace fastloss {
namespace scalar {
namespace {

void decode(const RansTable &table, RansStream stream, uint8_t *out) {
  uint32_t entries[kSlots]; // frequency, bias, symbol, escape: a byte each
  for (int s = 0; s < kSlots; ++s)
    entries[s] = uint32_t(table.frequency[s]) | uint32_t(table.bias[s]) << 8 | uint32_t(table.symbol[s]) << 16 |
                 uint32_t(s >= table.first_escape) << 24;
  uint16_t states[kRansLanes];
  std::memcpy(states, stream.begin, sizeof states);
  for (int64_t step = 0; step < stream.steps; ++step, out += kRansLanes) {
    const uint8_t *cursor = stream.cursor;
    uint32_t escapes = 0;
    for (int lane = 0; lane < kRansLanes; ++lane) {
      const uint32_t x = states[lane], entry = entries[x & 255];
      const uint32_t after = (entry & 255) * (x >> 8) + (entry >> 8 & 255);
      const uint32_t need = after < 256; // 0 or 1: as a branch it would be guessed wrong all the time
      out[lane] = uint8_t(entry >> 16);
      escapes |= entry >> 24 << lane;
      states[lane] = uint16_t(after << 8 * need | (*cursor & (0 - need)));
      cursor += need;
    }
    stream.cursor = std::min(cursor, stream.end);
    if (escapes) read_literals(stream, escapes, out);
  }
}

} // namespace
} // namespace scalar

void r8_decode_blocks(const RansPlane &plane, int64_t numel, int64_t first_block, int64_t count, uint8_t *out,
                      int isa) {
  const int level = level_for(isa);
  const RansTable table = table_of(plane.frequencies);
  RansStream streams[kRansBlocks];
  for (int64_t b = 0; b < count; ++b) streams[b] = stream_of(plane, numel, first_block + b);
#ifdef __x86_64__
  if (level >= kAvx512 && has_byte_look_ups()) avx512::decode(table, streams, int(count), out);
  else if (level >= kAvx2) avx2::decode(table, streams, int(count), out);
  else
#endif
    for (int64_t b = 0; b < count; ++b) scalar::decode(table, streams[b], out + b * kLosslessBlock);
  for (int64_t b = 0; b < count; ++b) {
    const int64_t made = streams[b].steps * kRansLanes;
    std::memset(out + b * kLosslessBlock + made, 0, size_t(kLosslessBlock - made));
  }
}

} // namespace fastloss
