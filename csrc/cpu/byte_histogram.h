// Exact counts of bytes, on the CPU. docs/design.md, "The lossless contract".
#pragma once
#include <cstdint>

namespace fastloss {

// counts[256] of the plane's first numel bytes. isa as in cpu.h.
void byte_histogram_cpu(const uint8_t *plane, int64_t numel, int64_t *counts, int isa);
// The same of the fields (exponents) of numbers of kind 0 .. 4, read once and kept nowhere.
void field_histogram_cpu(const void *x, int number, int64_t numel, int64_t *counts, int isa);
// counts[byte planes][256] of `blocks` whole blocks, every `apart`-th from the first on.
void sample_planes_cpu(const void *x, int number, int64_t blocks, int64_t apart, int64_t *counts, int isa);

} // namespace fastloss
