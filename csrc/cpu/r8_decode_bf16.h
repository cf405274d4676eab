// R8 to bf16 at once, with AVX-512: fields are merged with signs and mantissas between the steps that decode the next.
#pragma once
#include "r8_decode.h"

namespace fastloss {

// Where lines of 64 bytes of blocks go: multiples of 64 bytes. Nowhere if there is no `out`.
struct BlockLines {
  uint8_t *out = nullptr;
  int64_t stride = 0; // from block to block
  uint8_t *of(int64_t block) const { return out + block * stride; }
};

// kRansBlocks whole blocks, a piece of each at a time.
class RansBf16 {
public:
  static constexpr int64_t kPiece = 512; // numbers

  // Of bf16 whose signs and mantissas are not coded, on a machine that has what it takes. isa as in cpu.h.
  static bool takes(const Compressed &c, int isa);

  RansBf16(const Compressed &c, const RansTable &table, int64_t first_block);

  // The next kPiece numbers of each block to `cached`, past the cache to `streamed`, or to both.
  void next(BlockLines cached, BlockLines streamed);

private:
  const RansTable &table_;
  RansBlocks blocks_;
  const uint8_t *plane_;
  int64_t done_ = 0;                                    // numbers of each block
  alignas(64) uint8_t fields_[2][kRansBlocks * kPiece]; // of this piece and the next
};

} // namespace fastloss
