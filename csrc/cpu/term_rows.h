// The rows of row_terms on the CPU: what happens once a row, in double. row_terms.cpp has the statistics and the
// gradient, row_terms_both.h the gradient made right after the statistics.
#pragma once
#include "row_terms_loops.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <omp.h>
#include <vector>

namespace fastloss {
namespace {

constexpr int64_t kFewElements = 1 << 13; // not worth waking a second thread
constexpr double kLog2eDouble = 1.44269504088896340736, kRootTwo = 1.41421356237309504880;
constexpr double kInf = std::numeric_limits<double>::infinity(), kNan = std::numeric_limits<double>::quiet_NaN();
// A rest this far below everything else may share its powers: the scores are rounded to a multiple of this number.
constexpr double kSharedRest = 8;
// The lean loops: a KL from here on, whose rounding is then a millionth of it.
constexpr double kSmallKl = 0.05, kLn2 = 0.693147180559945309417;

struct FreeMemory {
  void operator()(void *address) const { std::free(address); }
};
using Floats = std::unique_ptr<float, FreeMemory>;

Floats floats(int64_t count) {
  size_t bytes = size_t(count + 15) / 16 * 64 + 64;
  return Floats(static_cast<float *>(std::aligned_alloc(64, bytes)));
}

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

double finite(double top) { return top == -kInf ? 0 : top; }

// Phi on both sides of the mean without losing digits: twice the mass between two edges, in units of sqrt(2) sigma.
double mass_between(double left, double right) {
  return left > 0 ? std::erfc(left) - std::erfc(right) : std::erfc(-right) - std::erfc(-left);
}

// What one thread needs for its rows.
struct Scratch {
  Floats powers, teacher_powers, slopes, block_exponents, log_generated;
  std::vector<float> own;          // coefficients of the row, under kBoth
  double log_denominator = 0;      // of the probabilities that are generated
  std::vector<int64_t> listed;     // distinct columns of the row, ascending
  std::vector<float> coefficients; // of these columns, under kGradient
};

class TermRows {
public:
  TermRows(const RowTerms &args, int isa)
      : args_(args), loops_(term_loops_for(args.dtype, args.teacher_dtype, isa)),
        raw_((args.want & kTerm) && args.term >= kLogCosh),
        normalised_((args.want & kTerm) && args.term != kNoTerm && args.term < kLogCosh),
        lean_(normalised_ && args.teacher && !args.value && args.softcap == 0 && args.scale > 0 &&
              !(args.want & ~(kTerm | kTeacher))) {
    if (!args.subset) return;
    subset_ = floats(args.v);
    for (int64_t j = 0; j < args.v; ++j) subset_.get()[j] = args.subset[j] ? 1.f : 0.f;
  }

  void run() const {
    const int64_t rows = args_.n;
    const int threads = rows * args_.v <= kFewElements ? 1 : int(std::min<int64_t>(omp_get_max_threads(), rows));
    if (threads <= 1) return run(0, rows);
#pragma omp parallel num_threads(threads)
    {
      int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
      run(rows * thread / team, rows * (thread + 1) / team);
    }
  }

private:
  const RowTerms &args_;
  const TermLoops loops_;
  const bool raw_, normalised_;
  const bool lean_; // KL or a mixture of two, and nothing else
  Floats subset_;

  float &stat(int which, int64_t r) const { return args_.stats[which * args_.n + r]; }
  float coefficient(int which, int64_t r, const Scratch &scratch) const {
    return args_.mode == kBoth ? scratch.own[which] : args_.coef[which * args_.n + r];
  }
  int64_t id(int64_t r, int64_t k) const { return args_.listed[r * args_.k + k]; }
  bool absent(int64_t id) const { return id < 0 || id == args_.ignore_index; }

  double score(double logit) const {
    double z = logit * args_.scale, cap = args_.softcap;
    return cap != 0 ? cap * std::tanh(z / cap) : z;
  }

  void run(int64_t begin, int64_t end) const {
    Scratch scratch;
    const bool keeps = normalised_ && args_.mode != kGradient;
    if (keeps) scratch.powers = floats(args_.v);
    if (lean_ && args_.mode == kBoth)
      scratch.slopes = floats(args_.v), scratch.block_exponents = floats(args_.v / 32 + 2);
    if (args_.mode == kBoth) scratch.own.assign(size_t(kCoefListed + args_.k), 0.f);
    if (keeps || args_.value) scratch.teacher_powers = floats(args_.v);
    if (args_.value) scratch.log_generated = floats(args_.v);
    for (int64_t r = begin; r < end; ++r) row(r, scratch);
  }

  void row(int64_t r, Scratch &scratch) const;
  bool find_listed(int64_t r, Scratch &scratch) const;
  TermLine line_of(int64_t r, Scratch &scratch) const;
  double generate(int64_t r, Scratch &scratch) const;
  void find_tops(const TermLine &line, const Scratch &scratch, double &rest_top, double &top) const;
  void statistics(int64_t r, TermLine &line, const Scratch &scratch) const;
  void prepare_lean(TermLine &line) const;
  bool lean_statistics(int64_t r, TermLine &line, const Scratch &scratch) const;
  void write_term(int64_t r, const TermLine &line, const TermHalves &halves) const;
  void gradient(int64_t r, TermLine &line, Scratch &scratch) const;
  void write_listed(int64_t r, const TermLine &line) const;

  // row_terms_both.h
  bool kept_gradient(int64_t r, TermLine &line, Scratch &scratch) const;
  bool kept_halves(TermLine &line, KeptKind kind, const KeptSums &sums, double &slope, TermHalves &halves) const;
  void own_coefficients(int64_t r, Scratch &scratch) const;
  void both(int64_t r, bool good, TermLine &line, Scratch &scratch) const;
};

// log2 of the power that the lean loops give a score of `top`.
double top_exponent(float scale, float top, float logit_scale, float exponent) {
  return double(scale) * (double(top) / logit_scale) - exponent;
}

} // namespace
} // namespace fastloss
