// Statistics of the rows and columns of a matrix of scores that is never stored, and their gradients.
#pragma once
#include "../pair_stats.h"
#include "cpu.h"

namespace fastloss {

// The level of the instruction set that pair kernels run on: `isa`, or the best of this machine, AMX included.
int pair_isa(int isa);

// Floats of `kept` that hold every <q, k> of an m x n matrix.
int64_t pair_kept_floats(int64_t m, int64_t n);

// Same result, bit for bit, in every run with as many threads: the width of a block of columns, and so the order of
// some sums, follows their number.
void pair_stats_cpu(const PairStats &args, int isa);

} // namespace fastloss
