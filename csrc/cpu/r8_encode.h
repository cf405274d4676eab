// R8 on the CPU: a plane of bytes, or the fields of numbers, to interleaved rANS streams. docs/design.md, "The lossless
// contract".
#pragma once
#include "block_planes.h"

#include <memory>
#include <vector>

namespace fastloss {

// The payloads of all blocks, in pieces that follow one another: one a thread.
struct RansPayloads {
  struct GiveBack {
    size_t bytes;
    void operator()(uint8_t *memory) const;
  };
  struct Piece {
    std::unique_ptr<uint8_t[], GiveBack> memory;
    int64_t bytes;
  };
  std::vector<Piece> pieces;

  int64_t bytes() const;
  void copy_to(uint8_t *data) const;
};

// plane: `numel` bytes. frequencies: [256] of sum 1 .. 255, else std::invalid_argument. Writes offsets [blocks + 1].
// isa as in cpu.h.
RansPayloads r8_encode_cpu(const uint8_t *plane, const uint8_t *frequencies, int64_t numel, int64_t *offsets, int isa);

struct R8Numbers {
  ByteSplit split; // without `field`: that is coded, and all else kept
  const uint8_t *frequencies;
  int64_t *offsets;
  uint8_t *data; // section DATA of the field
  int64_t room;  // bytes there that may be written
  SectionSums *sums;
};

// Numbers split and their fields coded, each read once, and the checksums of what was written. Returns the bytes of
// `data`, or -1 where they do not fit.
int64_t r8_encode_numbers_cpu(const R8Numbers &args, int isa);

} // namespace fastloss
