// Functions of saved codes, backwards: codes are decoded into the first level of the cache, where the gradient uses
// them.
#include "saved_gradient.h"
#include "cpu.h"
#include "huge_pages.h"
#include "simd_codes.h"

#include <algorithm>
#include <omp.h>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastloss {
namespace {

constexpr int64_t kBlock = 1024;        // numbers decoded at a time
constexpr int64_t kSerial = 1 << 14;    // elements that are not worth waking a second thread
constexpr int64_t kStreamed = 16 << 20; // bytes of a result that would push everything else out of the cache

struct SavedLoops {
  void (*decode)(const SavedGradient &, int64_t begin, int64_t count, float *to);
  void (*gradient)(const SavedGradient &, int64_t begin, int64_t count, const float *decoded, bool stream);
};

} // namespace

#define FASTLOSS_LOOPS "saved_gradient.inc"
#include "each_isa.inc"
#undef FASTLOSS_LOOPS

namespace {

SavedLoops loops_for(const SavedGradient &args, int isa) {
  const int best = best_isa();
  if (isa < kBestIsa || isa > best)
    throw std::invalid_argument("isa must be -1 (best) to " + std::to_string(best) + " (" + isa_name(best) +
                                ") on this machine, got " + std::to_string(isa));
#ifdef __x86_64__
  const int level = isa == kBestIsa ? best : isa;
  if (level == kAvx512Bf16) return avx512bf16::saved_loops(args.dtype, args.function);
  if (level == kAvx512) return avx512::saved_loops(args.dtype, args.function);
  if (level == kAvx2) return avx2::saved_loops(args.dtype, args.function);
#endif
  return scalar::saved_loops(args.dtype, args.function);
}

} // namespace

void saved_gradient_cpu(const SavedGradient &args, int isa) {
  const SavedLoops loops = loops_for(args, isa);
  const int64_t bytes = args.n * (args.dtype == kFloat32 ? 4 : 2);
  const bool stream = bytes > kStreamed;
  if (stream) ask_for_huge_pages(args.out, size_t(bytes));
  const int64_t unit = args.function == kSoftmax ? args.columns : kBlock;
  const int64_t units = args.n ? (args.n + unit - 1) / unit : 0;
  const int threads = args.n <= kSerial ? 1 : int(std::min<int64_t>(omp_get_max_threads(), units));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> decoded(size_t(unit + 16));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < units; ++i) {
      const int64_t begin = i * unit, count = std::min(unit, args.n - begin);
      loops.decode(args, begin, count, decoded.data());
      loops.gradient(args, begin, count, decoded.data(), stream);
    }
#ifdef __x86_64__
    if (stream) _mm_sfence(); // before anyone reads what went past the cache
#endif
  }
}

} // namespace fastloss
