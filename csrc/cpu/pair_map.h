// pair_map and its backward, on the CPU: docs/design.md, "pair_map".
#pragma once
#include "../pair_stats.h"

namespace fastloss {

// isa as in cpu.h.
void pair_map_cpu(const PairMap &args, int isa);

} // namespace fastloss
