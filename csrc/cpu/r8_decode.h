// R8 on the CPU: bytes out of interleaved rANS streams. docs/design.md, "The lossless contract".
#pragma once
#include "../lossless.h"
#include "cpu.h"

namespace fastloss {

// Blocks that are decoded side by side: enough independent streams to hide the latency of one.
constexpr int64_t kRansBlocks = 8;

// The bytes of blocks first_block .. first_block + count (1 .. kRansBlocks) of a plane of `numel` bytes, to `out`
// [count][kLosslessBlock], aligned to 64 bytes; beyond the plane's steps zeros. Whatever the plane holds, it reads only
// `frequencies`, the offsets of these blocks, and data[0, data_bytes + 64). isa as in cpu.h.
void r8_decode_blocks(const RansPlane &plane, int64_t numel, int64_t first_block, int64_t count, uint8_t *out, int isa);

} // namespace fastloss
