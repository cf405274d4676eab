// Numbers to P7: docs/design.md, "The lossless contract".
#pragma once
#include "block_planes.h"

#include <vector>

namespace fastloss {

// The escapes of a tensor: of runs of consecutive blocks, in their order.
struct Escapes {
  struct Run {
    std::vector<uint16_t> positions;
    std::vector<uint8_t> values;    // two numbers a position
    bool any[kMostBytePlanes] = {}; // whether the blocks' byte plane holds a byte that is not 0
  };
  std::vector<Run> runs;

  int64_t count() const {
    int64_t sum = 0;
    for (const Run &run : runs) sum += int64_t(run.positions.size());
    return sum;
  }
  bool any(int plane) const {
    for (const Run &run : runs)
      if (run.any[plane]) return true;
    return false;
  }
  void write(uint16_t *positions, uint8_t *values) const;
};

struct P7Encode {
  ByteSplit split;      // without `field`
  const uint8_t *table; // [256], section TABLE
  uint8_t *codes;
  uint64_t *offsets; // [blocks + 1]
  SectionSums *sums; // null: not wanted
};

// isa as in cpu.h.
void p7_histogram_cpu(const void *x, int number, int64_t numel, int64_t *counts, int isa);
Escapes p7_encode_cpu(const P7Encode &args, int isa);

} // namespace fastloss
