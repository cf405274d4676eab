// R8's table from counts of bytes: contract.frequencies, compiled.
#pragma once
#include <cstdint>

namespace fastloss {

// counts: [256], their sum below 2^38. log2: [257] whole numbers, round(2^20 log2 f) of f = 1 .. 256. Writes
// frequencies [256].
void r8_frequencies(const int64_t *counts, const int64_t *log2, uint8_t *frequencies);

} // namespace fastloss
