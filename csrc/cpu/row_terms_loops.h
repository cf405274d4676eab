// The loops of row_terms over the columns of one row, for every instruction set, and what they take and return.
#pragma once
#include "../row_terms.h"
#include "cpu.h"
#include "simd.h"
#include "simd_log.h"

namespace fastloss {
namespace {

// The lean and the kept loops take scores up to here.
constexpr float kLargestLean = 1e6f;

// A row of logits or of a teacher's scores; z = softcap * tanh(scale * value / softcap).
struct Scores {
  const void *values;
  float scale, softcap;
};

// What the loops over the columns find. Powers are e^((z - M)/T), of the teacher e^((t - M_t)/T); those of the rest and
// of the subset are relative to their own maxima, at T = 1.
struct TermSums {
  double powers = 0, teacher_powers = 0, rest = 0, subset = 0;
  double score = 0, teacher = 0;                // sum power (z - M), sum power (t - M_t)
  double score_of_teacher = 0, teacher_own = 0; // the same two with the teacher's powers
  double total = 0, squares = 0, raw_term = 0;  // sum (z - M), sum (z - M)^2, sum f of a raw term
  float best = -kInfinity;
  int64_t best_column = 0;
};

// The two halves of a term, without their factors A and B, and what its slopes are made of.
struct TermHalves {
  double of_teacher = 0, of_student = 0; // the summands that A and B multiply (total variation: the first)
  double slope = 0, teacher_slope = 0;   // total variation: f_a, f_b; mixture: sum (A q + B p) (1 - beta) p/m
};

// One row, as the loops need it.
struct TermLine {
  Scores logits, teacher;          // no teacher: null
  const float *subset;             // [v] 1 inside, 0 outside
  const int64_t *listed;           // distinct columns, ascending
  float *powers, *teacher_powers;  // [v] kept from the first pass for the second (generated: q itself)
  float *slopes, *block_exponents; // of the kept loops: [v], and two references a block
  const float *log_generated;      // [v] log q of probabilities that are generated, or null
  void *out;
  int64_t v, listed_count, argmax;
  int want, term;
  bool shares_rest, has_teacher_powers, proportional; // proportional: mixture with A q + B p a multiple of m
  float ref, rest_ref, subset_ref, teacher_ref;
  float inverse, warmth, shift; // 1 / T, log2(e) / T; what a - b is beyond the difference of the scores
  float power, teacher_power;   // p = power * e^..., q = teacher_power * e^...
  float a, b, beta;
  float exponent_scale, exponent, teacher_exponent, rest_scale, rest_exponent;
  float lean_power, lean_teacher_power, lean_shift;      // power, teacher_power and shift for the lean loops
  double kept_power, kept_other, kept_rest, kept_listed; // of the kept loops: factors of the gradient
  float rest, rest_of_all, all, all_z, all_t, teacher_share, slope, subset_share, column, linear, arg;
};

// Of the lean loops: powers are 2^(exponent_scale logit - exponent), the rest's at T = 1.
struct LeanSums {
  double powers = 0, teacher_powers = 0, rest = 0, forward = 0, reverse = 0;
};
enum LeanKind : int { kLeanForward, kLeanGeneral, kLeanMixture };

// Of the kept loops: sums of powers relative to the references of the row, and sum q (log2 q - log2 p), reverse: sum p
// (...).
struct KeptSums {
  double powers = 0, teacher_powers = 0, rest = 0, gap = 0;
};
struct MixtureSums {
  double of_student = 0, of_teacher = 0; // sum p log(p / m), sum q log(p / m)
};
enum KeptKind : int { kKeptForward, kKeptReverse, kKeptMixture };

struct KeptLoops {
  bool (*keep[3])(TermLine &, KeptSums &); // by kind
  MixtureSums (*mix)(const TermLine &);
  TermHalves (*mix_exactly)(const TermLine &);
  void (*write[3])(const TermLine &);
};

struct TermLoops;

struct LeanLoops {
  LeanSums (*sums)(const TermLine &);
  TermHalves (*halves)(const TermLine &);
  void (*gradient)(const TermLine &, const TermLoops &, const float *listed_coefficients);
};

struct ScoreLoops {
  float (*largest)(const void *values, int64_t begin, int64_t end, float sign);
  void (*read)(Scores scores, int64_t begin, int64_t count, float ref, float *x, float *slope);
  void (*write)(void *out, int64_t begin, int64_t count, const float *d);
};

struct TermLoops {
  ScoreLoops logits, teacher;
  float (*largest_inside)(const TermLine &, const ScoreLoops &);
  TermSums (*sums)(const TermLine &, const TermLoops &);
  TermHalves (*halves)(const TermLine &, const TermLoops &);
  TermHalves (*halves_of_mixture)(const TermLine &, const TermLoops &);
  void (*gradient)(const TermLine &, const TermLoops &, const float *listed_coefficients);
  LeanLoops lean;
  KeptLoops kept;
};

} // namespace

#define FASTLOSS_LOOPS "row_terms.inc"
#include "each_isa.inc"
#undef FASTLOSS_LOOPS

namespace {

inline TermLoops term_loops_for(int dtype, int teacher_dtype, int isa) {
#ifdef __x86_64__
  if (isa == kAvx512Bf16) return avx512bf16::term_loops(dtype, teacher_dtype);
  if (isa == kAvx512) return avx512::term_loops(dtype, teacher_dtype);
  if (isa == kAvx2) return avx2::term_loops(dtype, teacher_dtype);
#endif
  return scalar::term_loops(dtype, teacher_dtype);
}

} // namespace
} // namespace fastloss
