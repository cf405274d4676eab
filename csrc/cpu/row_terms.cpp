// row_terms on the CPU: docs/design.md, "The terms contract". The loops over the columns are in row_terms.inc, in fp32;
// here is what happens once a row, in double. Threads share out the rows, so no sum depends on their number.
#include "row_terms_both.h"

#include <stdexcept>
#include <string>

namespace fastloss {
namespace {

// False where an id is not a column.
bool TermRows::find_listed(int64_t r, Scratch &scratch) const {
  bool good = true;
  scratch.listed.clear();
  for (int64_t k = 0; k < args_.k; ++k) {
    if (absent(id(r, k))) continue;
    if (id(r, k) >= args_.v) good = false;
    else scratch.listed.push_back(id(r, k));
  }
  std::sort(scratch.listed.begin(), scratch.listed.end());
  scratch.listed.erase(std::unique(scratch.listed.begin(), scratch.listed.end()), scratch.listed.end());
  return good;
}

TermLine TermRows::line_of(int64_t r, Scratch &scratch) const {
  TermLine line = {};
  const char *logits = static_cast<const char *>(args_.logits), *teacher = static_cast<const char *>(args_.teacher);
  line.logits = {logits + r * args_.ld * bytes_of(args_.dtype), args_.scale, args_.softcap};
  if (teacher) line.teacher = {teacher + r * args_.ld_teacher * bytes_of(args_.teacher_dtype), 1.f, 0.f};
  line.subset = subset_.get();
  line.listed = scratch.listed.data(), line.listed_count = int64_t(scratch.listed.size());
  line.powers = scratch.powers.get(), line.teacher_powers = scratch.teacher_powers.get();
  line.slopes = scratch.slopes.get(), line.block_exponents = scratch.block_exponents.get();
  line.log_generated = scratch.log_generated.get();
  if (args_.dlogits) line.out = static_cast<char *>(args_.dlogits) + r * args_.ld_out * bytes_of(args_.dtype);
  line.v = args_.v, line.argmax = -1;
  line.want = args_.want, line.term = args_.want & kTerm ? args_.term : int(kNoTerm);
  const double temperature = args_.temperature ? args_.temperature[r] : 1;
  line.inverse = float(1 / temperature), line.warmth = float(kLog2eDouble / temperature);
  line.a = args_.a, line.b = args_.b, line.beta = args_.c;
  const double a = args_.a, b = args_.b, beta = args_.c;
  line.proportional = std::fabs(a * (1 - beta) - b * beta) <= 2e-7 * (std::fabs(a) + std::fabs(b));
  return line;
}

// q and log q around the row's value; returns the log of the denominator.
double TermRows::generate(int64_t r, Scratch &scratch) const {
  const double low = args_.a, width = args_.b, unit = 1 / (args_.c * kRootTwo);
  const double value = std::min(std::max(double(args_.value[r]), low), low + width * double(args_.v));
  auto edge = [&](int64_t j) { return (low + double(j) * width - value) * unit; };
  const double total = args_.value[r] == args_.value[r] ? mass_between(edge(0), edge(args_.v)) : kNan;
  for (int64_t j = 0; j < args_.v; ++j) {
    double q = mass_between(edge(j), edge(j + 1)) / total;
    scratch.teacher_powers.get()[j] = float(q);
    scratch.log_generated.get()[j] = float(std::log(q));
  }
  return std::log(total / 2);
}

// The maxima over the rest and over all columns, NaN left out.
void TermRows::find_tops(const TermLine &line, const Scratch &scratch, double &rest_top, double &top) const {
  const float sign = args_.scale < 0 ? -1.f : 1.f;
  int64_t begin = 0;
  double largest = -kInf;
  auto look = [&](int64_t end) { // at the columns between two listed ones
    if (end > begin) largest = std::max(largest, double(loops_.logits.largest(line.logits.values, begin, end, sign)));
    begin = end + 1;
  };
  for (int64_t column : scratch.listed) look(column);
  look(args_.v);
  const bool nothing = int64_t(scratch.listed.size()) == args_.v;
  top = rest_top = nothing ? -kInf : double(float(score(sign * largest)));
  for (int64_t column : scratch.listed)
    top = std::max(top, double(float(score(element(line.logits.values, args_.dtype, column)))));
}

// The powers of the lean loops have a rounded exponent; its rounding, the same for every column, is known here.
void TermRows::prepare_lean(TermLine &line) const {
  const double warmth = line.warmth; // as rounded: equal scores of student and teacher have equal exponents
  line.exponent_scale = float(args_.scale * warmth), line.exponent = float(line.ref * warmth);
  line.teacher_exponent = float(line.teacher_ref * warmth);
  line.rest_scale = float(args_.scale * kLog2eDouble), line.rest_exponent = float(line.rest_ref * kLog2eDouble);
}

// KL alone: one pass over the scores, two where it is small. False where only the general loops can tell.
bool TermRows::lean_statistics(int64_t r, TermLine &line, const Scratch &scratch) const {
  if (!lean_ || line.term != kKl || !(std::fabs(line.ref) < kLargestLean && std::fabs(line.teacher_ref) < kLargestLean))
    return false;
  prepare_lean(line);
  const LeanSums sums = loops_.lean.sums(line);
  const double top = top_exponent(line.exponent_scale, line.ref, args_.scale, line.exponent);
  const double teacher_top = top_exponent(line.warmth, line.teacher_ref, 1, line.teacher_exponent);
  const double rest_top = top_exponent(line.rest_scale, line.rest_ref, args_.scale, line.rest_exponent);
  const double log_powers = std::log(sums.powers), log_teacher = std::log(sums.teacher_powers);
  const double forward = sums.forward * kLn2 / sums.teacher_powers + (log_powers - log_teacher);
  const double reverse = sums.reverse * kLn2 / sums.powers + (log_teacher - log_powers);
  if (!std::isfinite(sums.powers) || !std::isfinite(sums.teacher_powers)) return false;
  // The largest score is in the rest, so what is listed is half of the sum at most.
  double rest = line.inverse == 1 ? sums.powers * std::exp2(-top) : sums.rest * std::exp2(-rest_top);
  for (int64_t column : scratch.listed)
    rest -= std::exp(score(element(line.logits.values, args_.dtype, column)) - line.rest_ref);
  stat(kRestMax, r) = stat(kAllMax, r) = line.ref;
  stat(kRestLogSum, r) = float(std::log(rest));
  stat(kAllLogSum, r) = float(log_powers - top * kLn2);
  stat(kTeacherMax, r) = line.teacher_ref;
  stat(kTeacherLogSum, r) = float(log_teacher - teacher_top * kLn2);
  TermHalves halves;
  if ((args_.a == 0 || forward > kSmallKl) && (args_.b == 0 || reverse > kSmallKl)) {
    halves.of_teacher = forward, halves.of_student = reverse;
  } else { // the direct form cancels
    line.lean_power = float(1 / sums.powers), line.lean_teacher_power = float(1 / sums.teacher_powers);
    line.lean_shift = float(log_teacher - log_powers);
    halves = loops_.lean.halves(line);
  }
  write_term(r, line, halves);
  return true;
}

void TermRows::statistics(int64_t r, TermLine &line, const Scratch &scratch) const {
  const int want = args_.want;
  double rest_top, top, subset_top = -kInf, teacher_top = 0;
  find_tops(line, scratch, rest_top, top);
  if (want & kSubset) subset_top = loops_.largest_inside(line, loops_.logits);
  line.has_teacher_powers = line.log_generated || (want & (kTeacher | kScoreMean)) || normalised_;
  const bool reads_teacher = line.teacher.values && (line.has_teacher_powers || (want & kTeacherMean));
  if (reads_teacher) teacher_top = loops_.teacher.largest(line.teacher.values, 0, args_.v, 1.f);
  line.ref = float(finite(top)), line.rest_ref = float(finite(rest_top));
  line.subset_ref = float(finite(subset_top)), line.teacher_ref = float(finite(teacher_top));
  if (top == rest_top && teacher_top > -kInf && lean_statistics(r, line, scratch)) return;
  line.shares_rest = top == rest_top && line.inverse == 1;
  const TermSums sums = loops_.sums(line, loops_);

  auto largest = [](double among, double total) { return float(std::isnan(total) && among != kInf ? kNan : among); };
  const double logsum = std::log(sums.powers);
  double teacher_logsum = std::log(sums.teacher_powers);
  stat(kRestMax, r) = largest(rest_top, sums.rest);
  stat(kRestLogSum, r) = float(std::log(sums.rest));
  stat(kAllMax, r) = largest(top, sums.powers);
  stat(kAllLogSum, r) = float(logsum);
  if (want & kEntropy) stat(kAllMean, r) = float(sums.score / sums.powers);
  if (want & kSum) stat(kAllSum, r) = float(sums.total);
  if (want & kSumSq) stat(kAllSumSq, r) = float(sums.squares);
  if (want & kTeacherMean) stat(kTeacherMeanRow, r) = float(sums.teacher / sums.powers);
  if (want & kArgmax) args_.argmax[r] = sums.best_column;
  if (want & kSubset) {
    stat(kSubsetMax, r) = largest(subset_top, sums.subset);
    stat(kSubsetLogSum, r) = float(std::log(sums.subset));
  }
  if (line.log_generated) {
    teacher_logsum = scratch.log_denominator;
  } else if (reads_teacher) {
    stat(kTeacherMax, r) = largest(teacher_top, sums.teacher_powers);
    if (want & kScoreMean) stat(kTeacherOwnMean, r) = float(sums.teacher_own / sums.teacher_powers);
  }
  if (line.has_teacher_powers) stat(kTeacherLogSum, r) = float(teacher_logsum);
  if (want & kScoreMean)
    stat(kScoreMeanRow, r) = float(sums.score_of_teacher / (line.log_generated ? 1 : sums.teacher_powers));
  if (raw_) stat(kTermRow, r) = float(sums.raw_term);
  if (normalised_) {
    line.power = float(1 / sums.powers);
    line.teacher_power = line.log_generated ? 1.f : float(1 / sums.teacher_powers);
    line.shift = float((line.log_generated ? 0 : teacher_logsum) - logsum);
    TermHalves halves;
    if (line.term == kMixture) { // q (log q - log m) by itself is good enough unless the sum is small
      halves = loops_.halves_of_mixture(line, loops_);
      if ((args_.a == 0 || halves.of_teacher > kSmallKl) && (args_.b == 0 || halves.of_student > kSmallKl))
        return write_term(r, line, halves);
    }
    write_term(r, line, loops_.halves(line, loops_));
  }
}

// Term and slopes, of the sums of p and q known to be 1.
void TermRows::write_term(int64_t r, const TermLine &line, const TermHalves &halves) const {
  const double a = args_.a, b = args_.b, beta = args_.c;
  if (args_.term == kTotalVariation) {
    stat(kTermRow, r) = float(halves.of_teacher);
    stat(kSlope, r) = float(halves.slope), stat(kTeacherSlope, r) = float(halves.teacher_slope);
    return;
  }
  const double of_teacher = a == 0 ? 0 : a * halves.of_teacher, of_student = b == 0 ? 0 : b * halves.of_student;
  stat(kTermRow, r) = float(of_teacher + of_student);
  double slope = b + of_student, teacher_slope = a + of_teacher;
  if (args_.term == kKl) {
    slope -= a, teacher_slope -= b;
  } else {
    const double shared = line.proportional ? (1 - beta) * (a + b) : halves.slope;
    slope -= shared, teacher_slope -= a + b - shared;
  }
  stat(kSlope, r) = float(slope), stat(kTeacherSlope, r) = float(teacher_slope);
}

void TermRows::gradient(int64_t r, TermLine &line, Scratch &scratch) const {
  auto given = [&](int flag, int row) { // a term whose coefficient is 0 is not computed
    const float value = line.want & flag ? coefficient(row, r, scratch) : 0.f;
    if (value == 0) line.want &= ~flag;
    return value;
  };
  auto inverse_sum = [](double logsum) { return logsum == -kInf ? 0 : std::exp(-logsum); };
  const double logsum = stat(kAllLogSum, r), rest_logsum = stat(kRestLogSum, r);
  const double teacher_logsum = stat(kTeacherLogSum, r);
  line.all_z = given(kEntropy, kCoefAllZ), line.all_t = given(kTeacherMean, kCoefAllT);
  line.teacher_share = given(kScoreMean, kCoefTeacher), line.slope = given(kTerm, kCoefTerm);
  line.column = given(kSum, kCoefColumn), line.linear = given(kSumSq, kCoefLinear);
  line.subset_share = given(kSubset, kCoefSubset);
  line.arg = given(kArgmax, kCoefArg);
  if (line.want & kArgmax) line.argmax = args_.argmax[r];
  line.has_teacher_powers = (line.want & kScoreMean) || (normalised_ && (line.want & kTerm));
  line.ref = float(finite(stat(kAllMax, r))), line.rest_ref = float(finite(stat(kRestMax, r)));
  line.subset_ref = float(finite(stat(kSubsetMax, r))), line.teacher_ref = float(finite(stat(kTeacherMax, r)));
  line.power = float(inverse_sum(logsum));
  line.teacher_power = line.log_generated ? 1.f : float(inverse_sum(teacher_logsum));
  line.shift = float((line.log_generated ? 0 : teacher_logsum) - logsum);
  line.all = line.rest_of_all = coefficient(kCoefAll, r, scratch);
  if (line.subset_share != 0) line.subset_share = float(line.subset_share * inverse_sum(stat(kSubsetLogSum, r)));
  const double rest = coefficient(kCoefRest, r, scratch), apart = double(line.ref) - line.rest_ref;
  if (rest != 0 && rest_logsum != -kInf) {
    line.rest = float(rest * inverse_sum(rest_logsum));
    line.shares_rest = apart <= kSharedRest && line.inverse == 1;
    if (line.shares_rest) line.rest_of_all = float(line.all + rest * std::exp(apart + logsum - rest_logsum));
  }
  scratch.coefficients.assign(scratch.listed.size(), 0.f);
  for (int64_t k = 0; k < args_.k; ++k) {
    if (absent(id(r, k))) continue;
    auto place = std::lower_bound(scratch.listed.begin(), scratch.listed.end(), id(r, k)) - scratch.listed.begin();
    scratch.coefficients[place] += coefficient(kCoefListed + int(k), r, scratch);
  }
  const bool lean_term = line.term == kKl || (line.term == kMixture && line.proportional);
  const bool finite_scores = std::fabs(line.ref) < kLargestLean && std::fabs(line.teacher_ref) < kLargestLean;
  if (lean_ && line.slope != 0 && lean_term && finite_scores && (line.rest == 0 || line.shares_rest)) {
    prepare_lean(line);
    const double top = top_exponent(line.exponent_scale, line.ref, args_.scale, line.exponent);
    const double teacher_top = top_exponent(line.warmth, line.teacher_ref, 1, line.teacher_exponent);
    line.lean_power = float(inverse_sum(logsum) * std::exp2(-top));
    line.lean_teacher_power = float(inverse_sum(teacher_logsum) * std::exp2(-teacher_top));
    line.lean_shift = float((teacher_logsum - logsum) + (teacher_top - top) * kLn2);
    return loops_.lean.gradient(line, loops_, scratch.coefficients.data());
  }
  loops_.gradient(line, loops_, scratch.coefficients.data());
}

void TermRows::row(int64_t r, Scratch &scratch) const {
  const bool good = find_listed(r, scratch), ignored = args_.k > 0 && id(r, 0) == args_.ignore_index;
  if (args_.mode != kGradient) {
    for (int i = 0; i < kListedScores + int(args_.k); ++i) stat(i, r) = 0;
    if (args_.want & kArgmax) args_.argmax[r] = -1;
  }
  TermLine line = line_of(r, scratch);
  if (ignored || (!good && args_.mode == kGradient)) {
    if (args_.mode != kStats) fill(line.out, args_.dtype, args_.v, ignored ? 0.f : float(kNan));
    return;
  }
  if (line.log_generated) scratch.log_denominator = generate(r, scratch);
  if (args_.mode == kBoth) return both(r, good, line, scratch);
  if (args_.mode == kGradient) return gradient(r, line, scratch);
  statistics(r, line, scratch);
  write_listed(r, line);
}

void TermRows::write_listed(int64_t r, const TermLine &line) const {
  for (int64_t k = 0; k < args_.k; ++k) {
    const int64_t column = id(r, k);
    stat(kListedScores + int(k), r) = absent(column) ? -kInfinity
                                      : column >= args_.v
                                          ? float(kNan)
                                          : float(score(element(line.logits.values, args_.dtype, column)));
  }
}

} // namespace

void row_terms_cpu(const RowTerms &args, int isa) {
  int best = best_isa();
  if (isa < kBestIsa || isa > best)
    throw std::invalid_argument("isa must be -1 (best) to " + std::to_string(best) + " (" + isa_name(best) +
                                ") on this machine, got " + std::to_string(isa));
  TermRows(args, isa == kBestIsa ? best : isa).run();
}

} // namespace fastloss
