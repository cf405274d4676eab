// The row contract on the CPU: docs/design.md. A row is read once and its gradient written once; between the two it
// stays in L2. The loops over columns are in row_stats.inc, in fp32; here is what happens once a row, in double, so
// that a result is rounded only when it is written.
#include "../margin_loss.h"
#include "cpu.h"
#include "huge_pages.h"
#include "row_loops.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <omp.h>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastloss {
namespace {

// A row is summed in parts of a fixed size, which several threads may share: the sums do not depend on their number.
constexpr int64_t kPart = 16384;
constexpr int64_t kMostKept = 1 << 18;  // powers of a row kept between the passes: 1 MiB of L2 at most
constexpr int64_t kSerial = 1 << 15;    // elements that are not worth waking a second thread
constexpr int64_t kStreamed = 16 << 20; // bytes of gradient that would push everything else out of the cache
constexpr double kLn2 = 0.693147180559945309417, kLog2eExact = 1.44269504088896340736;
constexpr double kInf = std::numeric_limits<double>::infinity(), kNan = std::numeric_limits<double>::quiet_NaN();

int64_t bytes_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

float element(const void *values, int dtype, int64_t i) {
  return dtype == kFloat32   ? static_cast<const float *>(values)[i]
         : dtype == kFloat16 ? to_float(static_cast<const Float16 *>(values)[i])
                             : to_float(static_cast<const BFloat16 *>(values)[i]);
}

void fill(void *values, int dtype, int64_t count, float with) {
  for (int64_t i = 0; i < count; ++i) {
    if (dtype == kFloat32) static_cast<float *>(values)[i] = with;
    else if (dtype == kFloat16) from_float(static_cast<Float16 *>(values)[i], with);
    else from_float(static_cast<BFloat16 *>(values)[i], with);
  }
}

const char *row_at(const void *values, int dtype, int64_t offset) {
  return values ? static_cast<const char *>(values) + offset * bytes_of(dtype) : nullptr;
}

double softplus(double x) { return std::max(x, 0.) + std::log1p(std::exp(-std::fabs(x))); }
double sigmoid(double x) {
  double small = std::exp(-std::fabs(x));
  return (x < 0 ? small : 1) / (1 + small);
}

void merge_lean(Sums &all, const Sums &part) {
  const float top = std::max(all.top, part.top);
  if (part.sum == 0 || all.sum == 0) {
    if (part.sum != 0) all = part;
    all.top = top;
    return;
  }
  double ratio = std::exp2(-std::fabs(double(all.exponent) - part.exponent));
  if (part.exponent > all.exponent) {
    all.sum = all.sum * ratio + part.sum;
    all.exponent = part.exponent;
  } else {
    all.sum += part.sum * ratio;
  }
  all.top = top;
}

void merge_general(Sums &all, const Sums &part) {
  all.sum += part.sum, all.weighted += part.weighted, all.tempered += part.tempered, all.total += part.total;
  all.squares += part.squares, all.picked += part.picked, all.mass += part.mass;
  if (part.best > all.best || (part.best != part.best && all.best == all.best)) {
    all.best = part.best;
    all.best_column = part.best_column;
  }
}

// What is known of a row in double before it is rounded to `stats`.
struct Found {
  double ref, target, logsum, power_sum; // power_sum: in the units of Line::exponent (lean) or ref (general)
  double margin;                         // d of the contract
  float largest;                         // of the rest
  Sums sums;
};

// The lean loops round a row's exponent to float, at most 64 off up to here; beyond, powers of two would overflow.
constexpr float kLargestExponent = 1e9f;

// One call of the kernel.
class Rows {
public:
  Rows(const RowStats &args, int isa)
      : args_(args), loops_(loops_for(args.dtype, isa)), threads_(omp_get_max_threads()),
        lean_(!args.prob && args.softcap == 0 && args.want == 0 && args.scale > 0 &&
              std::isfinite(float(args.scale * kLog2eExact))) {}

  void run() {
    int64_t rows = args_.n, columns = args_.v, bytes = rows * columns * bytes_of(args_.dtype);
    bool fresh = args_.mode != kStats && args_.dlogits != args_.logits;
    stream_ = fresh && bytes > kStreamed;
    if (fresh && args_.ld_out == columns) ask_for_huge_pages(args_.dlogits, size_t(bytes));
    split_ = threads_ > 1 && rows < threads_ && columns > 2 * kPart;
    if (split_ || threads_ == 1 || rows * columns <= kSerial) {
      run(0, rows);
    } else {
#pragma omp parallel num_threads(threads_)
      {
        int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
        run(rows * thread / team, rows * (thread + 1) / team);
      }
    }
  }

private:
  const RowStats &args_;
  const Loops loops_;
  const int threads_;
  const bool lean_; // the target column and nothing else: loops without a single extra instruction
  bool stream_ = false, split_ = false;

  void run(int64_t begin, int64_t end) const {
    // In 16 bits the powers cost more than the traffic: those of the first pass are kept for the second.
    std::unique_ptr<float, decltype(&std::free)> kept(nullptr, &std::free);
    if (lean_ && args_.mode == kBoth && args_.dtype != kFloat32 && args_.v <= kMostKept && begin < end)
      kept.reset(static_cast<float *>(
          std::aligned_alloc(64, size_t(kept_columns() + args_.v / kSmallestBlock + 16) / 16 * 64)));
    for (int64_t r = begin; r < end; ++r) row(r, kept.get());
    finish_streams();
  }

  int64_t kept_columns() const { return (args_.v + 15) / 16 * 16; }

  // Streamed stores become visible before anyone reads them.
  void finish_streams() const {
#ifdef __x86_64__
    if (stream_) _mm_sfence();
#endif
  }

  template <class Body> void for_parts(const Body &body) const {
    int64_t parts = (args_.v + kPart - 1) / kPart;
    auto one = [&](int64_t part) { body(part, Columns{part * kPart, std::min(args_.v, (part + 1) * kPart)}); };
    if (!split_) {
      for (int64_t part = 0; part < parts; ++part) one(part);
    } else {
#pragma omp parallel for schedule(static) num_threads(threads_)
      for (int64_t part = 0; part < parts; ++part) {
        one(part);
        finish_streams();
      }
    }
  }

  // The parts' results, merged in the order of the columns whoever made them.
  template <class Result, class Loop, class Merge>
  void reduce(Result &all, const Line &line, const Loop &loop, const Merge &merge) const {
    if (!split_) {
      for_parts([&](int64_t, Columns columns) { merge(all, loop(line, columns)); });
    } else {
      std::vector<Result> each((args_.v + kPart - 1) / kPart);
      for_parts([&](int64_t part, Columns columns) { each[part] = loop(line, columns); });
      for (const Result &part : each) merge(all, part);
    }
  }

  double score(double logit) const {
    double z = logit * args_.scale, cap = args_.softcap;
    return cap != 0 ? cap * std::tanh(z / cap) : z;
  }

  void row(int64_t r, float *kept) const;
  Line line_of(int64_t r, float *kept) const;
  bool lean_statistics(Line &line, Found &found) const;
  void general_statistics(Line &line, Found &found) const;
  void write_statistics(int64_t r, const Line &line, const Found &found) const;
  void own_coefficients(int64_t r, Line &line, const Found &found, bool lean) const;
  bool given_coefficients(int64_t r, Line &line) const;
};

Line Rows::line_of(int64_t r, float *kept) const {
  Line line = {};
  line.logits = row_at(args_.logits, args_.dtype, r * args_.ld);
  line.prob = row_at(args_.prob, args_.prob_dtype, r * args_.ld_prob);
  line.out = const_cast<char *>(row_at(args_.dlogits, args_.dtype, r * args_.ld_out));
  line.column_weight = args_.column_weight;
  line.target = line.argmax = -1;
  if (args_.target && args_.target[r] >= 0 && args_.target[r] < args_.v) line.target = args_.target[r];
  line.want = args_.want;
  line.prob_is_float = args_.prob_dtype == kFloat32;
  line.stream = stream_;
  line.scale = args_.scale, line.softcap = args_.softcap, line.sign = args_.scale < 0 ? -1.f : 1.f;
  line.exponent_scale = float(args_.scale * kLog2eExact);
  if (args_.want & kTempered) line.warmth = float(kLog2eExact / args_.temperature[r]);
  if (kept) line.kept = kept, line.kept_exponents = kept + kept_columns();
  return line;
}

// False where the lean loops cannot tell: a NaN, or logits whose exponents overflow.
bool Rows::lean_statistics(Line &line, Found &found) const {
  reduce(found.sums, line, line.kept ? loops_.lean_sums_kept : loops_.lean_sums, merge_lean);
  const Sums &sums = found.sums;
  const bool lost = sums.sum == 0 && sums.top != -kInfinity;
  if (std::isnan(sums.sum) || lost || std::fabs(sums.exponent) > kLargestExponent) return false;
  line.exponent = sums.exponent;
  found.largest = float(score(sums.top));
  found.ref = found.largest == -kInfinity ? 0 : found.largest;
  found.power_sum = sums.sum;
  found.logsum = std::log(sums.sum) + (sums.exponent - found.ref / args_.scale * line.exponent_scale) * kLn2;
  return true;
}

void Rows::general_statistics(Line &line, Found &found) const {
  line.kept = nullptr;
  found.sums = Sums();
  float top = -kInfinity;
  reduce(top, line, loops_.largest_rest, [](float &all, float part) { all = std::max(all, part); });
  bool nothing = args_.v == 0 || (args_.v == 1 && line.target == 0);
  found.largest = nothing ? -kInfinity : float(score(double(line.sign) * top));
  found.ref = line.ref = found.largest == -kInfinity ? 0.f : found.largest;
  reduce(found.sums, line, loops_.general_sums, merge_general);
  if (std::isnan(found.sums.sum) && found.largest != kInfinity) found.largest = float(kNan); // `top` leaves NaN out
  found.power_sum = found.sums.sum;
  found.logsum = std::log(found.sums.sum);
}

void Rows::write_statistics(int64_t r, const Line &line, const Found &found) const {
  const Sums &sums = found.sums;
  const int want = args_.want;
  float values[kNumStats] = {};
  values[kMax] = found.largest;
  values[kLogSum] = float(found.logsum);
  values[kTarget] = args_.prob ? float(sums.picked) : float(found.target);
  if (want & kEntropy) {
    double margin = line.target >= 0 ? found.margin : -kInf; // without a target column all the mass is on the rest
    double mean = found.power_sum != 0 ? sigmoid(-margin) * sums.weighted / found.power_sum : 0;
    if (line.target >= 0 && found.target != -kInf) mean += sigmoid(found.margin) * (found.target - found.ref);
    values[kMean] = float(mean);
  }
  if (want & kSum) values[kSumRow] = float(sums.total);
  if (want & kSumSq) values[kSumSqRow] = float(sums.squares);
  if (want & kTempered) values[kLogSumT] = float(std::log(sums.tempered));
  values[kMass] = float(sums.mass);
  for (int i = 0; i < kNumStats; ++i) args_.stats[i * args_.n + r] = values[i];
  if (want & kArgmax) args_.argmax[r] = sums.best_column;
}

// kBoth: the coefficients of the loss that the epilogue describes.
void Rows::own_coefficients(int64_t r, Line &line, const Found &found, bool lean) const {
  auto weight = [&](int which) { return double(args_.row[which * args_.n + r]); };
  double nll = weight(kNll), lse_weight = weight(kLse), lse_square = weight(kLseSq), d = found.margin, rest, own;
  double h = lse_weight; // + 2 lse_square lse, but not 0 * inf
  if (args_.prob) {
    if (lse_square != 0) h += 2 * lse_square * (found.ref + found.logsum);
    rest = nll * found.sums.mass + h;
    own = -nll;
  } else if (args_.margin_loss != kNoMarginLoss) {
    own = nll * margin_slope(args_.margin_loss, args_.margin_a, args_.margin_b, d);
    rest = -own;
  } else {
    if (lse_square != 0)
      h += 2 * lse_square * (d > 0 ? found.target + softplus(-d) : found.ref + found.logsum + softplus(d));
    rest = (nll + h) * sigmoid(-d);
    own = h - rest;
  }
  double outer = lean ? args_.scale : 1; // the general loops multiply by the slope at the end
  line.factor = found.power_sum == 0 ? 0.f : float(rest * outer / found.power_sum);
  line.own = float(own * outer);
  line.column = float(weight(kSumWeight));
  line.want = args_.want & kSum; // other statistics have no term in this loss
}

// kGradient: coefficients and statistics are given. False where only the general loops can take the row.
bool Rows::given_coefficients(int64_t r, Line &line) const {
  auto coefficient = [&](int which) { return args_.row[which * args_.n + r]; };
  float largest = args_.stats[kMax * args_.n + r];
  double logsum = args_.stats[kLogSum * args_.n + r];
  line.ref = largest == -kInfinity ? 0.f : largest;
  double middle = line.ref / double(args_.scale) * line.exponent_scale;
  line.exponent = float(middle);
  bool lean = lean_ && std::fabs(line.exponent) <= kLargestExponent;
  bool empty = logsum == -kInf;
  double powers = empty ? 0 : lean ? std::exp((line.exponent - middle) * kLn2 - logsum) : std::exp(-logsum);
  double outer = lean ? args_.scale : 1;
  line.factor = float(coefficient(kRest) * outer * powers);
  line.own = float(coefficient(kOwn) * outer);
  if (args_.want & kEntropy) line.factor_z = float(coefficient(kRestZ) * powers);
  if (args_.want & kTempered)
    line.factor_t = empty ? 0.f : float(coefficient(kRestT) * std::exp(-double(args_.stats[kLogSumT * args_.n + r])));
  line.column = coefficient(kColumn), line.linear = coefficient(kLinear), line.arg = coefficient(kArg);
  if (args_.want & kArgmax) line.argmax = args_.argmax[r];
  return lean;
}

void Rows::row(int64_t r, float *kept) const {
  Line line = line_of(r, kept);
  bool outside = args_.target && line.target < 0;
  if (args_.target && args_.target[r] == args_.ignore_index) { // which may be a class id
    if (args_.mode != kGradient) {
      for (int i = 0; i < kNumStats; ++i) args_.stats[i * args_.n + r] = 0;
      if (args_.want & kArgmax) args_.argmax[r] = -1;
    }
    if (args_.mode != kStats) fill(line.out, args_.dtype, args_.v, 0);
    return;
  }
  bool lean = lean_;
  if (args_.mode == kGradient) {
    lean = given_coefficients(r, line);
  } else {
    Found found = {};
    if (line.target >= 0) found.target = score(element(line.logits, args_.dtype, line.target));
    else found.target = outside ? kNan : -kInf;
    if (!(lean && lean_statistics(line, found))) {
      lean = false;
      general_statistics(line, found);
    }
    // A target of +inf has no margin: in torch it is inf - inf.
    found.margin = found.target == kInf ? kNan : (found.target - found.ref) - found.logsum;
    write_statistics(r, line, found);
    if (args_.mode == kBoth) own_coefficients(r, line, found, lean);
  }
  if (args_.mode == kStats) return;
  if (outside) fill(line.out, args_.dtype, args_.v, float(kNan));
  else
    for_parts(
        [&](int64_t, Columns columns) { (lean ? loops_.lean_gradient : loops_.general_gradient)(line, columns); });
}

} // namespace

int best_isa() {
#ifdef __x86_64__
  __builtin_cpu_init();
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) return __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return kAvx2;
#endif
  return kScalar;
}

const char *isa_name(int isa) {
  static const char *const names[] = {"scalar", "avx2", "avx512", "avx512bf16"};
  return names[isa == kBestIsa ? best_isa() : isa];
}

void row_stats_cpu(const RowStats &args, int isa) {
  int best = best_isa();
  if (isa < kBestIsa || isa > best)
    throw std::invalid_argument("isa must be -1 (best) to " + std::to_string(best) + " (" + isa_name(best) +
                                ") on this machine, got " + std::to_string(isa));
  Rows(args, isa == kBestIsa ? best : isa).run();
}

} // namespace fastloss
