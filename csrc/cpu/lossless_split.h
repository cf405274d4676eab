// Numbers to fields, byte planes and bit planes: docs/design.md, "The lossless contract".
#pragma once
#include "../lossless.h"

namespace fastloss {

constexpr int kMostBytePlanes = 3, kMostBitPlanes = 4;

// Where the parts of consecutive groups of numbers go: a byte a number, bit planes a bit a number.
struct SplitParts {
  uint8_t *field, *bytes[kMostBytePlanes], *bits[kMostBitPlanes];
};
// Splits whole groups of numbers.
using SplitGroups = void (*)(const uint8_t *numbers, int64_t groups, const SplitParts &parts);
SplitGroups split_groups_for(int number, int isa);
// The field alone; all other parts may be null.
SplitGroups fields_for(int number, int isa);

// Splits `count` numbers of a block, zeros behind them up to a whole group.
void split_block(SplitGroups split, int number, const uint8_t *numbers, int64_t count, SplitParts parts);

struct ByteSplit {
  const void *x;
  int number;
  int64_t numel;
  uint8_t *field, *bytes[kMostBytePlanes]; // each [padded]
  uint8_t *bits;                           // section BITS
  uint32_t *block_crc;                     // [blocks], section BLOCK_CRC; null: not wanted; for encoders alone
};

// The parts of block `block`, of `field` there.
SplitParts parts_of_block(const ByteSplit &args, int64_t block, uint8_t *field);

// isa as in cpu.h.
void byte_split_cpu(const ByteSplit &args, int isa);

} // namespace fastloss
