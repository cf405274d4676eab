// A token of each row's softmax by the Gumbel-max trick, and its log-probability, in one pass over the logits.
//
// The noise is a function of seed, stream and column (docs/design.md, "Sampling"). It is only looked at where it could
// matter: e^(z - ref) is needed for the log-sum-exp anyhow and one comparison with the random bits says whether the
// column can still win. The few that can are judged in double, so that the draw is exact in the fp32 scores.
#include "cpu.h"
#include "philox.h"

#include <algorithm>
#include <cfloat>
#include <omp.h>
#include <stdexcept>
#include <vector>

namespace fastloss {
namespace {

constexpr uint32_t kCoarse = 1 << 16;          // below it 32 bits are too few, and 32 more are drawn
constexpr float kLowestLogExponential = -46.f; // log E > log 2^-65
constexpr float kLowest = -FLT_MAX;            // only -inf is less
constexpr int64_t kPart = 16384;               // columns whose sum does not depend on the number of threads
constexpr int64_t kSerial = 1 << 13;           // elements that are not worth waking a second thread

struct Columns {
  int64_t begin, end;
};

struct Row {
  const void *logits;
  float scale, softcap;
  Noise noise;
};

// What is known after some of a row's columns. sum is of e^(z - ref), ref the largest score or 0 where there is none.
struct Drawn {
  float top = -kInfinity, ref = 0, score = 0;
  double sum = 0, key = -double(kInfinity);
  int64_t column = -1;
};

uint32_t more_bits(const Noise &noise, int64_t column);

} // namespace

namespace scalar {
namespace {
#define FASTLOSS_LOOP static
#define FASTLOSS_INLINE static inline
#include "row_sample.inc"
#undef FASTLOSS_LOOP
#undef FASTLOSS_INLINE
} // namespace
} // namespace scalar

namespace {

// The lower 32 bits of a column's uniform number: those of the same counter in the other half.
uint32_t more_bits(const Noise &noise, int64_t column) {
  scalar::Bits words[4];
  scalar::philox(noise, uint32_t(column / 4), 1, words);
  return words[column % 4].value;
}

} // namespace

#ifdef __x86_64__
#define FASTLOSS_LOOP static __attribute__((target(FASTLOSS_TARGET)))
#define FASTLOSS_INLINE static inline __attribute__((target(FASTLOSS_TARGET), always_inline))

namespace avx2 {
namespace {
#define FASTLOSS_TARGET "avx2,fma,f16c"
#include "row_sample.inc"
#undef FASTLOSS_TARGET
} // namespace
} // namespace avx2

namespace avx512 {
namespace {
#define FASTLOSS_TARGET "avx512f,avx512bw,avx512dq,avx512vl"
#include "row_sample.inc"
#undef FASTLOSS_TARGET
} // namespace
} // namespace avx512

#undef FASTLOSS_LOOP
#undef FASTLOSS_INLINE
#endif

namespace {

using Draw = void (*)(const Row &, Columns, Drawn &);

template <class T> Draw draw_for(int isa) {
#ifdef __x86_64__
  if (isa >= kAvx512) return avx512::draw<T>;
  if (isa == kAvx2) return avx2::draw<T>;
#endif
  return scalar::draw<T>;
}

Row row_of(const RowSample &args, int64_t r) {
  const int64_t size = args.dtype == kFloat32 ? 4 : 2;
  const Noise noise = noise_of(uint64_t(*args.seed), uint64_t(args.streams[r]));
  return {static_cast<const char *>(args.logits) + r * args.ld * size, args.scale, args.softcap, noise};
}

// Sums merge in the order of the columns, and of equal keys the lower column stays.
void merge(Drawn &all, const Drawn &part) {
  const float top = std::max(all.top, part.top), ref = top == -kInfinity ? 0 : top;
  const auto at = [&](const Drawn &d) { return d.sum == 0 ? 0 : d.sum * std::exp(double(d.ref) - double(ref)); };
  const double sum = at(all) + at(part);
  if (part.key > all.key) all = part;
  all.top = top, all.ref = ref, all.sum = sum;
}

void sample_row(const RowSample &args, int64_t r, Draw draw, bool split) {
  const Row row = row_of(args, r);
  const int64_t parts = (args.v + kPart - 1) / kPart;
  const auto columns = [&](int64_t part) { return Columns{part * kPart, std::min(args.v, (part + 1) * kPart)}; };
  Drawn all;
  if (split) {
    std::vector<Drawn> each(static_cast<size_t>(parts));
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < parts; ++part) draw(row, columns(part), each[size_t(part)]);
    for (const Drawn &part : each) merge(all, part);
  } else {
    for (int64_t part = 0; part < parts; ++part) {
      Drawn next; // a part's sum begins anew, as if another thread made it; the best key only saves work
      next.key = all.key, next.column = all.column, next.score = all.score;
      draw(row, columns(part), next);
      merge(all, next);
    }
  }
  const bool distribution = all.column >= 0 && std::isfinite(all.sum);
  args.index[r] = distribution ? all.column : -1;
  args.logp[r] = distribution ? float(double(all.score) - double(all.ref) - std::log(all.sum)) : float(NAN);
}

} // namespace

void row_sample_cpu(const RowSample &args, int isa) {
  const int best = best_isa();
  if (isa < kBestIsa || isa > best) throw std::invalid_argument("isa must be -1 to " + std::to_string(best));
  if (isa == kBestIsa) isa = best;
  const Draw draw = args.dtype == kFloat32   ? draw_for<float>(isa)
                    : args.dtype == kFloat16 ? draw_for<Float16>(isa)
                                             : draw_for<BFloat16>(isa);
  const int threads = omp_get_max_threads();
  const bool split = threads > 1 && args.n < threads && args.v > 2 * kPart;
  const bool parallel = threads > 1 && !split && args.n * args.v > kSerial;
#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t r = 0; r < args.n; ++r) sample_row(args, r, draw, split);
}

} // namespace fastloss
