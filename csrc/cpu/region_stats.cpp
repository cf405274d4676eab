// The region contract on the CPU: docs/design.md. Logits and targets are read once for the statistics and once for the
// gradient, which is written once. The loops are in region_stats.inc, in fp32; sums of blocks are added in double.
#include "region_stats.h"
#include "huge_pages.h"
#include "region_loops.h"

#include <algorithm>
#include <omp.h>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastloss {
namespace {

// A region is summed in parts of a fixed size, which several threads may share: the sums do not depend on their number.
constexpr int64_t kPart = 32768;
constexpr int64_t kSerial = 1 << 15;    // values that are not worth waking a second thread
constexpr int64_t kStreamed = 16 << 20; // bytes of gradient that would push everything else out of the cache

int64_t bytes_of(int dtype) { return dtype == kByte ? 1 : dtype == kFloat32 ? 4 : 2; }

// One call of the kernel.
class Regions {
public:
  Regions(const RegionStats &args, int isa)
      : args_(args), loops_(region_loops_for(args.dtype, args.target_dtype, isa, args.want != 0)),
        parts_((args.size + kPart - 1) / kPart) {}

  void run() {
    if (args_.coef) {
      int64_t bytes = args_.n * args_.size * bytes_of(args_.dtype);
      stream_ = bytes > kStreamed;
      ask_for_huge_pages(args_.dlogits, size_t(bytes));
      for_parts([&](int64_t r, int64_t begin, int64_t count, int64_t) { loops_.gradient(region(r, begin), count); });
      return;
    }
    std::vector<RegionSums> found(size_t(parts_ > 1 ? args_.n * parts_ : 0));
    for_parts([&](int64_t r, int64_t begin, int64_t count, int64_t part) {
      RegionSums sums = loops_.sums(region(r, begin), count);
      if (parts_ > 1) found[size_t(part)] = sums;
      else write(r, sums);
    });
    if (parts_ == 1) return;
    for (int64_t r = 0; r < args_.n; ++r) {
      RegionSums all = {};
      for (int64_t part = 0; part < parts_; ++part)
        for (int k = 0; k < kNumRegionStats; ++k) all.value[k] += found[size_t(r * parts_ + part)].value[k];
      write(r, all);
    }
  }

private:
  const RegionStats &args_;
  const RegionLoops loops_;
  const int64_t parts_; // of a region
  bool stream_ = false;

  // f(region, first value, number of values, part) for every part of every region, each thread a run of neighbours.
  template <class F> void for_parts(F f) const {
    int64_t all = args_.n * parts_;
    int threads = args_.n * args_.size <= kSerial ? 1 : int(std::min<int64_t>(omp_get_max_threads(), all));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
      for (int64_t part = all * thread / team; part < all * (thread + 1) / team; ++part) {
        int64_t r = part / parts_, begin = part % parts_ * kPart;
        f(r, begin, std::min(kPart, args_.size - begin), part);
      }
#ifdef __x86_64__
      if (stream_) _mm_sfence(); // before another thread is told that its gradient is there
#endif
    }
  }

  Region region(int64_t r, int64_t begin) const {
    int64_t at = r * args_.size + begin, step = bytes_of(args_.dtype);
    Region result = {};
    result.logits = static_cast<const char *>(args_.logits) + at * step;
    result.target = static_cast<const char *>(args_.target) + at * bytes_of(args_.target_dtype);
    if (args_.mask) result.mask = args_.mask + r / args_.mask_share * args_.size + begin;
    result.want = args_.want;
    result.sharpness = args_.sharpness;
    if (!args_.coef) return result;
    result.out = static_cast<char *>(args_.dlogits) + at * step;
    for (int k = 0; k < kNumRegionCoefs; ++k) result.coef[k] = args_.coef[k * args_.n + r];
    result.stream = stream_;
    return result;
  }

  void write(int64_t r, const RegionSums &sums) const {
    for (int k = 0; k < kNumRegionStats; ++k) args_.stats[k * args_.n + r] = float(sums.value[k]);
  }
};

} // namespace

void region_stats_cpu(const RegionStats &args, int isa) {
  int best = best_isa();
  if (isa < kBestIsa || isa > best)
    throw std::invalid_argument("isa must be -1 (best) to " + std::to_string(best) + " (" + isa_name(best) +
                                ") on this machine, got " + std::to_string(isa));
  if (args.n > 0 && args.size > 0) Regions(args, isa == kBestIsa ? best : isa).run();
}

} // namespace fastloss
