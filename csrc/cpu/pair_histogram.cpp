// pair_histogram on the CPU: the sweep of pair_sweep.inc, and a table a thread. Shares are whole numbers of units, so
// that sums are exact: they do not depend on an order, and a table's total is the number of pairs.
#include "pair_histogram.h"
#include "pair_engine.h"

#include <mutex>

namespace fastloss {
namespace {

constexpr double kHistogramUnit = 1 << 26; // to a pair, of which int64 then holds 2^37

// The pairs between this bin and the next, and how many units of them belong to the next.
struct HistogramBin {
  int64_t count, share;
};

} // namespace

#define FASTLOSS_LOOPS "pair_histogram.inc"
#include "each_isa.inc"
#undef FASTLOSS_LOOPS

namespace {

void write_table(const PairHistogram &args, const std::vector<HistogramBin> &found) {
  for (int64_t member = 0; member < 2; ++member) {
    int64_t from_below = 0;
    for (int64_t n = 0; n < args.bins; ++n) {
      const HistogramBin &bin = found[size_t(member * args.bins + n)];
      const int64_t units = bin.count * int64_t(kHistogramUnit) - bin.share + from_below;
      args.table[member * args.bins + n] = float(double(units) / kHistogramUnit);
      from_below = bin.share;
    }
  }
}

} // namespace

void pair_histogram_cpu(const PairHistogram &args, int isa) {
  const pairs::Problem problem(args.pairing, false);
  const int dtype = args.pairing.dtype;
  if (!args.grad) {
    std::vector<HistogramBin> table(static_cast<size_t>(2 * args.bins));
    FASTLOSS_ON_ENGINE(dtype, isa, histogram_on, problem, args, table);
    write_table(args, table);
    return;
  }
  std::vector<float> slopes(static_cast<size_t>(2 * args.bins));
  for (int64_t member = 0; member < 2; ++member)
    for (int64_t n = member * args.bins; n + 1 < (member + 1) * args.bins; ++n)
      slopes[size_t(n)] = float((double(args.grad[n + 1]) - args.grad[n]) / args.step);
  FASTLOSS_ON_ENGINE(dtype, isa, histogram_gradient_on, problem, args, slopes.data());
}

} // namespace fastloss
