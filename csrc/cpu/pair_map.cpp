// pair_map on the CPU: the sweep of pair_sweep.inc, and phi on its products while they are in cache.
#include "pair_map.h"
#include "pair_engine.h"

namespace fastloss {

#define FASTLOSS_LOOPS "pair_map.inc"
#include "each_isa.inc"
#undef FASTLOSS_LOOPS

void pair_map_cpu(const PairMap &args, int isa) {
  const pairs::Problem problem(args.pairing, false);
  const int64_t m = args.pairing.m;
  std::vector<double> totals(static_cast<size_t>(args.grad ? 0 : m * kNumPairMapStats));
  FASTLOSS_ON_ENGINE(args.pairing.dtype, isa, pair_map_on, problem, args, totals.data());
  for (int64_t i = 0; !args.grad && i < m; ++i)
    for (int64_t row = 0; row < kNumPairMapStats; ++row)
      args.table[row * m + i] = float(totals[size_t(i * kNumPairMapStats + row)]);
}

} // namespace fastloss
