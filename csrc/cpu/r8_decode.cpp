// docs/design.md, "The lossless contract": R8 decoded with 32 lanes a block, the cursor clamped after each step.
#include "r8_decode.h"
#include "bit_blocks.h"

#include <algorithm>
#include <cstring>

namespace fastloss {
namespace {

constexpr int kSlots = 256;

// What a slot stands for, dealt in rising symbol; the escape has what is left, and always the last slot.
struct RansTable {
  alignas(64) uint8_t symbol[kSlots], frequency[kSlots], bias[kSlots]; // bias: slot - first slot of its symbol
  int first_escape;
};

RansTable table_of(const uint8_t *frequencies) {
  RansTable table;
  int at = 0;
  const auto deal = [&](int symbol, int slots) {
    std::memset(table.symbol + at, symbol, size_t(slots));
    std::memset(table.frequency + at, slots, size_t(slots));
    for (int i = 0; i < slots; ++i) table.bias[at + i] = uint8_t(i);
    at += slots;
  };
  for (int s = 0; s < kSlots; ++s)
    if (frequencies[s]) deal(s, std::min<int>(frequencies[s], kSlots - 1 - at));
  table.first_escape = at;
  deal(0, kSlots - at);
  return table;
}

// One block's stream. Never leaves [begin, end], however often a step asks: a step reads up to 32 bytes beyond.
struct RansStream {
  const uint8_t *begin, *end, *cursor, *literal; // literal: behind the next escaped byte, moving down
  int64_t steps;
};

RansStream stream_of(const RansPlane &plane, int64_t numel, int64_t block) {
  const uint64_t size = uint64_t(plane.data_bytes);
  const uint64_t begin = std::min(plane.offsets[block], size);
  const uint64_t end = std::max(std::min(plane.offsets[block + 1], size), begin);
  const int64_t numbers = std::min(kLosslessBlock, numel - block * kLosslessBlock);
  const uint8_t *first = plane.data + begin, *last = plane.data + end;
  const uint8_t *bytes = first + std::min<uint64_t>(end - begin, 2 * kRansLanes);
  return {first, last, bytes, last, (numbers + kRansLanes - 1) / kRansLanes};
}

// The escaped bytes of a step, `lanes` a mask.
inline void read_literals(RansStream &stream, uint64_t lanes, uint8_t *out) {
  for (; lanes; lanes &= lanes - 1) {
    if (stream.literal > stream.begin) --stream.literal;
    out[__builtin_ctzll(lanes)] = *stream.literal;
  }
}

namespace scalar {

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
      const bool need = after < 256;
      out[lane] = uint8_t(entry >> 16);
      escapes |= entry >> 24 << lane;
      states[lane] = uint16_t(need ? after << 8 | *cursor : after);
      cursor += need;
    }
    stream.cursor = std::min(cursor, stream.end);
    if (escapes) read_literals(stream, escapes, out);
  }
}

} // namespace scalar
} // namespace

void r8_decode_blocks(const RansPlane &plane, int64_t numel, int64_t first_block, int64_t count, uint8_t *out,
                      int isa) {
  const int level = level_for(isa);
  (void)level;
  const RansTable table = table_of(plane.frequencies);
  for (int64_t b = 0; b < count; ++b) {
    const RansStream stream = stream_of(plane, numel, first_block + b);
    uint8_t *bytes = out + b * kLosslessBlock;
    scalar::decode(table, stream, bytes);
    const int64_t made = stream.steps * kRansLanes;
    std::memset(bytes + made, 0, size_t(kLosslessBlock - made));
  }
}

} // namespace fastloss
