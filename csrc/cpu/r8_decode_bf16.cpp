// docs/design.md, "The lossless contract": R8 to bf16, a piece behind the steps that decode its fields.
#include "r8_decode_bf16.h"
#ifdef __x86_64__
#include "r8_decode_bf16_avx512.h"
#endif

namespace fastloss {

#ifdef __x86_64__

bool RansBf16::takes(const Compressed &c, int isa) {
  const bool plain =
      c.codec == kR8 && c.number == kBf16 && c.layout != kLayoutTiles && c.bytes[0] && !c.coded[1].frequencies;
  return plain && level_for(isa) >= kAvx512 && has_byte_look_ups();
}

RansBf16::RansBf16(const Compressed &c, const RansTable &table, int64_t first_block)
    : table_(table), blocks_(c.coded[0], first_block, kRansBlocks), plane_(c.bytes[0] + first_block * kLosslessBlock) {
  avx512::decode_fields(table_, blocks_, fields_[0]);
}

void RansBf16::next(BlockLines cached, BlockLines streamed) {
  const int64_t piece = done_ / kPiece;
  const avx512::Merge merge = {fields_[piece % 2], plane_ + done_, cached, streamed};
  done_ += kPiece;
  uint8_t *next = done_ < kLosslessBlock ? fields_[(piece + 1) % 2] : nullptr;
  if (!streamed.out) avx512::decode_and_merge<true, false>(table_, blocks_, next, merge);
  else if (!cached.out) avx512::decode_and_merge<false, true>(table_, blocks_, next, merge);
  else avx512::decode_and_merge<true, true>(table_, blocks_, next, merge);
}

#else

bool RansBf16::takes(const Compressed &, int) { return false; }
RansBf16::RansBf16(const Compressed &, const RansTable &table, int64_t) : table_(table), plane_(nullptr) {}
void RansBf16::next(BlockLines, BlockLines) {}

#endif

} // namespace fastloss
