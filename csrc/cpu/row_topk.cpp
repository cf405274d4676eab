// row_topk on the CPU: the sweep of pair_sweep.inc, and a heap a row. The matrix is never stored.
#include "row_topk.h"
#include "best_of_row.h"
#include "pair_engine.h"

namespace fastloss {

#define FASTLOSS_LOOPS "row_topk.inc"
#include "each_isa.inc"
#undef FASTLOSS_LOOPS

void row_topk_cpu(const RowTopk &args, int isa) {
  const int64_t m = args.pairing.m, most = std::min(args.count, args.pairing.n);
  const pairs::Memory<Candidate> heaps = pairs::allocate<Candidate>(m * most);
  std::vector<BestOfRow> best(static_cast<size_t>(m));
  for (int64_t i = 0; i < m; ++i) best[size_t(i)].begin(heaps.get() + i * most, most);
  const pairs::Problem problem(args.pairing, false);
  FASTLOSS_ON_ENGINE(args.pairing.dtype, isa, topk_on, problem, args, best.data());
#pragma omp parallel for
  for (int64_t i = 0; i < m; ++i) {
    float *values = args.values + i * args.count;
    int64_t *columns = args.columns + i * args.count;
    const Candidate *found = best[size_t(i)].sorted();
    for (int64_t k = 0; k < args.count; ++k) {
      const bool exists = k < best[size_t(i)].size();
      values[k] = exists ? found[k].score : -kInfinity;
      columns[k] = exists ? found[k].column : -1;
    }
  }
}

} // namespace fastloss
