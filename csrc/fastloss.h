// What bindings.cpp and the kernels share. Raw pointers and sizes only: no torch, no pybind11 in this file or in any
// kernel.
#pragma once
#include <cstdint>

namespace fastloss {

enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Which half of the row kernel runs. kBoth makes the gradient right after the statistics, while the row is still in
// cache.
enum Mode : int { kStats = 0, kGradient = 1, kBoth = 2 };

// Statistics beyond the target logit and the log-sum-exp of the rest, computed only when asked for.
enum Want : int { kEntropy = 1, kSum = 2, kSumSq = 4, kTempered = 8, kArgmax = 16 };

// Rows of `stats`, each of n floats. ref is max, or 0 where max is -inf. See docs/design.md, "The row contract".
enum Stat : int { kMax, kLogSum, kTarget, kMean, kSumRow, kSumSqRow, kLogSumT, kMass, kNumStats };
// Rows of `row` under kGradient: the coefficient of each term of the gradient.
enum Coef : int { kOwn, kRest, kRestZ, kColumn, kLinear, kRestT, kArg, kNumCoefs };
// Rows of `row` under kBoth: the cross entropy epilogue, already multiplied by the upstream gradient of the row.
enum Epilogue : int { kNll, kLse, kLseSq, kSumWeight, kNumEpilogues };

// One pass over logits that are given. All pointers are device pointers for the CUDA launcher.
struct RowStats {
  const void *logits;         // [n][ld] dtype
  const int64_t *target;      // [n], or null: no target column (then kTarget is -inf)
  const void *prob;           // [n][ld_prob] prob_dtype: target probabilities instead of `target`, or null
  const float *column_weight; // [v] c_j, or null: all one
  const float *temperature;   // [n] > 0, for kTempered
  const float *row;           // [kNumCoefs][n] under kGradient, [kNumEpilogues][n] under kBoth
  float *stats;               // [kNumStats][n]: written by kStats and kBoth, read by kGradient
  int64_t *argmax;            // [n], for kArgmax: written by kStats and kBoth, read by kGradient
  void *dlogits;              // [n][ld_out] dtype, may be `logits` itself
  int64_t n, v, ld, ld_prob, ld_out, ignore_index;
  int dtype, prob_dtype, mode, want;
  float scale, softcap; // z = softcap * tanh(scale * logit / softcap); softcap 0: z = scale * logit
  // kGradient on a GPU only: one number, or null. Where it is 1, dlogits holds this gradient already and nothing is
  // done.
  const float *upstream;
  // kBoth with a target: another loss of the margin (margin_loss.h) in the place of the epilogue's nll; its weight is
  // kNll.
  int margin_loss;
  float margin_a, margin_b;
};

} // namespace fastloss
