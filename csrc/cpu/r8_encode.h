// R8 on the CPU: a plane of bytes to interleaved rANS streams. docs/design.md, "The lossless contract".
#pragma once
#include "../lossless.h"
#include "cpu.h"

#include <memory>
#include <vector>

namespace fastloss {

// The payloads of all blocks, in pieces that follow one another.
struct RansPayloads {
  struct Piece {
    std::unique_ptr<uint8_t[]> data;
    int64_t bytes;
  };
  std::vector<Piece> pieces;

  int64_t bytes() const;
  void copy_to(uint8_t *data) const;
};

// plane: `numel` bytes. frequencies: [256] of sum 1 .. 255, else std::invalid_argument. Writes offsets [blocks + 1].
// isa as in cpu.h.
RansPayloads r8_encode_cpu(const uint8_t *plane, const uint8_t *frequencies, int64_t numel, int64_t *offsets, int isa);

} // namespace fastloss
