// The largest scores of each row, on the CPU: docs/design.md, "row_topk".
#pragma once
#include "../pair_stats.h"

namespace fastloss {

// isa as in cpu.h.
void row_topk_cpu(const RowTopk &args, int isa);

} // namespace fastloss
