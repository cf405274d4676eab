// What R8's decoders start from: the slots of a plane, and where each block's stream lies.
#pragma once
#include "r8_decode.h"

#include <algorithm>
#include <cstring>

namespace fastloss {
namespace {

constexpr int kSlots = 256;

// What a slot stands for, dealt in rising symbol; the escape has what is left, and always the last slot.
struct RansTable {
  alignas(64) uint8_t symbol[kSlots], frequency[kSlots], bias[kSlots]; // bias: slot - first slot of its symbol
  int symbols, first_escape;                                           // the escape is a symbol
};

RansTable table_of(const uint8_t *frequencies) {
  RansTable table;
  int at = 0;
  table.symbols = 1;
  const auto deal = [&](int symbol, int slots) {
    std::memset(table.symbol + at, symbol, size_t(slots));
    std::memset(table.frequency + at, slots, size_t(slots));
    for (int i = 0; i < slots; ++i) table.bias[at + i] = uint8_t(i);
    at += slots;
  };
  for (int s = 0; s < kSlots; ++s)
    if (const int slots = std::min<int>(frequencies[s], kSlots - 1 - at)) deal(s, slots), ++table.symbols;
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
  const auto clamped = [&](uint64_t offset) { // a negative one is 0
    return std::min(std::max<int64_t>(int64_t(offset), 0), plane.data_bytes);
  };
  const int64_t begin = clamped(plane.offsets[block]);
  const int64_t end = std::max(clamped(plane.offsets[block + 1]), begin);
  const int64_t numbers = std::min(kLosslessBlock, numel - block * kLosslessBlock);
  const uint8_t *first = plane.data + begin, *last = plane.data + end;
  const uint8_t *bytes = first + std::min<int64_t>(end - begin, 2 * kRansLanes);
  return {first, last, bytes, last, (numbers + kRansLanes - 1) / kRansLanes};
}

// The escaped bytes of a step, `lanes` a mask.
inline void read_literals(RansStream &stream, uint64_t lanes, uint8_t *out) {
  for (; lanes; lanes &= lanes - 1) {
    if (stream.literal > stream.begin) --stream.literal;
    out[__builtin_ctzll(lanes)] = *stream.literal;
  }
}

} // namespace
} // namespace fastloss
