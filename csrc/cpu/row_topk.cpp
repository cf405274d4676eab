// row_topk on the CPU: the sweep of pair_sweep.inc, and a few candidates a row. The matrix is never stored.
#include "row_topk.h"
#include "best_of_row.h"
#include "pair_engine.h"

namespace fastloss {

#define FASTLOSS_LOOPS "row_topk.inc"
#include "each_isa.inc"
#undef FASTLOSS_LOOPS

void row_topk_cpu(const RowTopk &args, int isa) {
  const int64_t m = args.pairing.m, most = std::min(args.count, args.pairing.n), room = BestOfRow::room_for(most);
  std::fill_n(args.values, m * args.count, -kInfinity);
  std::fill_n(args.columns, m * args.count, -1);
  if (most == 0) return;
  const pairs::Memory<Candidate> candidates = pairs::allocate<Candidate>(m * room);
  std::vector<BestOfRow> best(static_cast<size_t>(m));
  for (int64_t i = 0; i < m; ++i) best[size_t(i)].begin(candidates.get() + i * room, most);
  const pairs::Problem problem(args.pairing, false);
  FASTLOSS_ON_ENGINE(args.pairing.dtype, isa, topk_on, problem, args, best.data());
#pragma omp parallel for
  for (int64_t i = 0; i < m; ++i) {
    const int64_t found = best[size_t(i)].finish();
    for (int64_t k = 0; k < found; ++k) {
      args.values[i * args.count + k] = candidates[size_t(i * room + k)].score;
      args.columns[i * args.count + k] = candidates[size_t(i * room + k)].column;
    }
  }
}

} // namespace fastloss
