// The region kernel on the CPU: statistics of regions of logits, or the gradient of any loss made of them.
#pragma once
#include "../region_stats.h"

namespace fastloss {

// isa as in cpu.h.
void region_stats_cpu(const RegionStats &args, int isa);

} // namespace fastloss
