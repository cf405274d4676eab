// What bindings.cpp and the row_terms kernels share; docs/design.md, "The terms contract", says what each number is.
#pragma once
#include "fastloss.h"

namespace fastloss {

// Beyond the flags of fastloss.h.
enum TermWant : int { kTeacher = 32, kTeacherMean = 64, kScoreMean = 128, kTerm = 256, kSubset = 512 };

enum Term : int { kNoTerm, kKl, kMixture, kTotalVariation, kLogCosh, kBceLogits, kBce };

// Rows of `stats`, each of n floats; the listed scores follow.
enum TermStat : int {
  kRestMax,
  kRestLogSum,
  kAllMax,
  kAllLogSum,
  kAllMean,
  kAllSum,
  kAllSumSq,
  kTeacherMax,
  kTeacherLogSum,
  kTeacherMeanRow,
  kScoreMeanRow,
  kTeacherOwnMean,
  kTermRow,
  kSlope,
  kTeacherSlope,
  kSubsetMax,
  kSubsetLogSum,
  kListedScores
};

// Rows of `coef`; the coefficients of the listed columns follow.
enum TermCoef : int {
  kCoefRest,
  kCoefAll,
  kCoefAllZ,
  kCoefAllT,
  kCoefTeacher,
  kCoefTerm,
  kCoefSubset,
  kCoefColumn,
  kCoefLinear,
  kCoefArg,
  kCoefListed
};

struct RowTerms {
  const void *logits;       // [n][ld] dtype
  const int64_t *listed;    // [n][k], or null (k = 0)
  const void *teacher;      // [n][ld_teacher] teacher_dtype (ld_teacher 0: one row for all), or null
  const float *value;       // [n], or null: the teacher's probabilities are generated around it
  const uint8_t *subset;    // [v] 0 or 1, or null
  const float *temperature; // [n] > 0, or null: 1
  const float *coef;        // [kCoefListed + k][n] under kGradient
  float *stats;             // [kListedScores + k][n]: written by kStats and kBoth, read by kGradient
  int64_t *argmax;          // [n], for kArgmax
  void *dlogits;            // [n][ld_out] dtype, may be `logits` itself
  int64_t n, v, k, ld, ld_teacher, ld_out, ignore_index;
  int dtype, teacher_dtype, mode, want, term;
  float scale, softcap, a, b, c; // a, b, c: the numbers of the term, or low, width, sigma with `value`
  // kBoth (CPU): the loss nll_share (-log p_y) + term_share (term) of every row, y its only listed column
  double nll_share = 0, term_share = 0;
};

} // namespace fastloss
