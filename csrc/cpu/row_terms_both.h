// kBoth of row_terms on the CPU: the gradient of a loss that is linear in -log p_y and the term, made right after the
// row's statistics. KL one way and mixtures whose A q + B p is a multiple of m keep their powers (row_term_kept.inc);
// everything else runs both halves one after the other, while the row is in L2.
#pragma once
#include "term_rows.h"

namespace fastloss {
namespace {

// A rest below this, relative to the largest power, has lost digits in fp32.
constexpr double kSmallestRest = 0x1p-60;
// A mixture's half is a KL less what comes close to it: where the KL is larger, both are made from p and q.
constexpr double kLargeKl = 3;
// A mixture takes p for at least 2^-80 of the largest of its block, which must be a normal number of the row.
constexpr double kLargestRise = 20;

// What autograd gives for the loss: d (-log p_y) = sigmoid(-d) (d rest - d z_y), d = z_y - log sum of the rest.
void TermRows::own_coefficients(int64_t r, Scratch &scratch) const {
  const double share = args_.term_share * (args_.temperature ? 1 / double(args_.temperature[r]) : 1);
  scratch.own[kCoefTerm] = float(share);
  scratch.own[kCoefAll] = raw_ ? 0.f : float(-share * stat(kSlope, r));
  if (args_.nll_share == 0) return;
  const double margin = stat(kListedScores, r) - double(stat(kRestMax, r)) - stat(kRestLogSum, r);
  const double miss = args_.nll_share / (1 + std::exp(margin));
  scratch.own[kCoefRest] = float(miss), scratch.own[kCoefListed] = float(-miss);
}

// The term's halves and `slope`, the sum of f_a. False where only the general loops can tell.
bool TermRows::kept_halves(TermLine &line, KeptKind kind, const KeptSums &sums, double &slope,
                           TermHalves &halves) const {
  const double shift = std::log(sums.teacher_powers) - std::log(sums.powers), a = args_.a, b = args_.b;
  line.power = line.lean_power = float(1 / sums.powers);
  line.teacher_power = line.lean_teacher_power = float(1 / sums.teacher_powers), line.lean_shift = float(shift);
  const double share = sums.gap * kLn2 / (kind == kKeptReverse ? sums.powers : sums.teacher_powers);
  double kl = kind == kKeptReverse ? shift - share : share - shift;
  if (!std::isfinite(kl)) return false;
  if (kind == kKeptMixture) {
    if (double(line.exponent) - line.block_exponents[0] > kLargestRise) return false;
    const MixtureSums mixture = loops_.kept.mix(line);
    // sum p = sum q, which takes the rounding of their factors away
    const double gap = double(line.teacher_power) * sums.teacher_powers - double(line.power) * sums.powers;
    halves.of_student = mixture.of_student + args_.c * gap, halves.of_teacher = kl + mixture.of_teacher;
    if (!(kl < kLargeKl && halves.of_student > kSmallKl && halves.of_teacher > kSmallKl))
      halves = loops_.kept.mix_exactly(line);
    slope = b * halves.of_student;
  } else {
    if (kl > kSmallKl) (kind == kKeptReverse ? halves.of_student : halves.of_teacher) = kl;
    else halves = loops_.lean.halves(line);
    slope = kind == kKeptReverse ? b * (1 + halves.of_student) : -a;
  }
  return std::isfinite(halves.of_student) && std::isfinite(halves.of_teacher);
}

bool TermRows::kept_gradient(int64_t r, TermLine &line, Scratch &scratch) const {
  const bool mixture = line.term == kMixture && line.proportional, with_nll = args_.nll_share != 0;
  if (!lean_ || !(mixture || (line.term == kKl && (args_.a == 0) != (args_.b == 0)))) return false;
  if (line.listed_count > 1 || (with_nll && (line.inverse != 1 || line.listed_count != 1))) return false;
  const KeptKind kind = mixture ? kKeptMixture : args_.b == 0 ? kKeptForward : kKeptReverse;
  line.exponent_scale = float(args_.scale * line.warmth);
  KeptSums sums;
  double slope;
  TermHalves halves;
  if (!loops_.kept.keep[kind](line, sums) || (with_nll && !(sums.rest > kSmallestRest))) return false;
  if (!kept_halves(line, kind, sums, slope, halves)) return false;

  const double top = top_exponent(line.exponent_scale, line.ref, args_.scale, line.exponent);
  const double teacher_top = top_exponent(line.warmth, line.teacher_ref, 1, line.teacher_exponent);
  stat(kRestMax, r) = stat(kAllMax, r) = line.ref, stat(kTeacherMax, r) = line.teacher_ref;
  stat(kAllLogSum, r) = float(std::log(sums.powers) - top * kLn2);
  stat(kTeacherLogSum, r) = float(std::log(sums.teacher_powers) - teacher_top * kLn2);
  if (line.inverse == 1) stat(kRestLogSum, r) = float(std::log(sums.rest) - top * kLn2);
  write_term(r, line, halves);
  write_listed(r, line);
  own_coefficients(r, scratch);

  const double scale = args_.scale, term = args_.term_share * line.inverse, a = args_.a, b = args_.b;
  double own = -term * slope;
  if (kind == kKeptReverse) own += term * b * (1 + double(line.lean_shift));
  line.kept_rest = with_nll ? scale * (scratch.own[kCoefRest] / sums.rest) : 0;
  line.kept_power = scale * (own / sums.powers) + line.kept_rest;
  line.kept_other = kind == kKeptForward   ? -(scale * (term * a / sums.teacher_powers))
                    : kind == kKeptReverse ? scale * (term * b * -kLn2 / sums.powers)
                                           : scale * (term * b);
  line.kept_listed = scale * scratch.own[kCoefListed];
  loops_.kept.write[kind](line);
  return true;
}

void TermRows::both(int64_t r, bool good, TermLine &line, Scratch &scratch) const {
  if (good && kept_gradient(r, line, scratch)) return;
  statistics(r, line, scratch);
  write_listed(r, line);
  if (!good) return fill(line.out, args_.dtype, args_.v, float(kNan));
  own_coefficients(r, scratch);
  TermLine again = line_of(r, scratch);
  gradient(r, again, scratch);
}

} // namespace
} // namespace fastloss
