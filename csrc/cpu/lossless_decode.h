// Compressed tensors to numbers on the CPU: docs/design.md, "The lossless contract".
#pragma once
#include "../lossless.h"

namespace fastloss {

// Numbers first..first+count in row-major order; item: bytes of a number; isa as in cpu.h. Layout tiles: multiples of
// 16 rows.
void lossless_decode_cpu(const Compressed &c, int item, int64_t first, int64_t count, uint8_t *out, int isa);

// All numbers, or with a null `out` none: they are only checked. The first block whose checksum is wrong, or -1.
int64_t lossless_decode_checked_cpu(const Compressed &c, int item, uint8_t *out, int isa);

// Rows of the matrix (layout rows). Returns the first place of an index that is no row, or -1; then nothing is written.
int64_t lossless_rows_cpu(const Compressed &c, int item, const int64_t *index, int64_t count, uint8_t *out, int isa);

} // namespace fastloss
