// R8's table of slots from exact counts, on the CPU: contract.frequencies (python/fastloss/lossless/contract.py).
#pragma once
#include <cstdint>

namespace fastloss {

// frequencies[256] from counts[256]; log2[f] = round(2^20 log2 f) for f of 1 to 256. false, and nothing is written,
// where a count is negative or their sum 2^38 or more: costs would not fit 64 bits.
bool r8_frequencies_cpu(const int64_t *counts, const int32_t *log2, uint8_t *frequencies);

} // namespace fastloss
