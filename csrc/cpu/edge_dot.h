// The dot products along a list of edges and their gradient, on the CPU.
#pragma once
#include "../pair_stats.h"

namespace fastloss {

// isa as in cpu.h. An id out of range is a std::out_of_range, and nothing is read.
void edge_dot_cpu(const EdgeDot &args, int isa);
void edge_sum_cpu(const EdgeSum &args, int isa);

} // namespace fastloss
