// R8 on the CPU: bytes out of interleaved rANS streams. docs/design.md, "The lossless contract".
#pragma once
#include "../lossless.h"
#include "bit_blocks.h"
#include "cpu.h"

namespace fastloss {

// Blocks that are decoded side by side: enough independent streams to hide the latency of one.
constexpr int64_t kRansBlocks = 8;
constexpr int kSlots = 256;

// What a plane's slots stand for, dealt in rising symbol; the escape has what is left, and always the last slot.
struct RansTable {
  explicit RansTable(const uint8_t *frequencies);

  // By slot; bias: slot - first slot of its symbol.
  alignas(64) uint8_t symbol[kSlots], frequency[kSlots], bias[kSlots];
  int symbols, first_escape; // the escape is a symbol
  // By slot its symbol's number, and by number what it stands for: of up to kFewSymbols.
  static constexpr int kFewSymbols = 64;
  alignas(64) uint8_t number[kSlots], symbol_of[kFewSymbols], frequency_of[kFewSymbols], first_of[kFewSymbols];
};

// One block's stream. Its pointers never leave [begin, end], however often a step asks: a step reads up to 64 bytes
// beyond.
struct RansStream {
  const uint8_t *begin, *end, *cursor, *literal; // literal: behind the next escaped byte, moving down
};

// Up to kRansBlocks neighbouring blocks of a plane on their way, all at the same step.
class RansBlocks {
public:
  RansBlocks() = default;
  // Blocks first_block .. first_block + count of a plane. Whatever the plane holds, only the offsets of these blocks
  // and data[0, data_bytes + 64) are read.
  RansBlocks(const RansPlane &plane, int64_t first_block, int64_t count);

  // Of block b the next `steps` (up to kLosslessBlock / kRansLanes), a byte a lane, to out + b stride; out and stride
  // are multiples of 64 bytes. A block is written behind an odd number of them, and steps that a block does not have
  // give some bytes. isa as in cpu.h.
  void decode(const RansTable &table, int64_t steps, uint8_t *out, int64_t stride, int isa);

  alignas(64) uint16_t states[kRansBlocks][kRansLanes];
  RansStream streams[kRansBlocks];
  int64_t count = 0;
};

} // namespace fastloss
