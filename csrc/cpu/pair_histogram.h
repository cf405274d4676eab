// pair_histogram and its backward, on the CPU: docs/design.md, "pair_histogram".
#pragma once
#include "../pair_stats.h"

namespace fastloss {

// isa as in cpu.h.
void pair_histogram_cpu(const PairHistogram &args, int isa);

} // namespace fastloss
