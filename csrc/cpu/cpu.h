// The CPU kernels, and the instruction sets they are compiled for. `isa` -1 means the best one of this machine.
#pragma once
#include "../fastloss.h"
#include "../row_terms.h"

namespace fastloss {

enum Isa : int { kBestIsa = -1, kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

int best_isa();
const char *isa_name(int isa);

void row_stats_cpu(const RowStats &args, int isa);
void row_sample_cpu(const RowSample &args, int isa);
void row_terms_cpu(const RowTerms &args, int isa);

} // namespace fastloss
