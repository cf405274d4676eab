// Exact counts of bytes, on the CPU.
#pragma once
#include <cstdint>

namespace fastloss {

// counts[256] of the plane's first numel bytes. isa as in cpu.h.
void byte_histogram_cpu(const uint8_t *plane, int64_t numel, int64_t *counts, int isa);

} // namespace fastloss
