// What bindings.cpp and the region kernels share. See docs/design.md, "The region contract".
#pragma once
#include "fastloss.h"

namespace fastloss {

// The dtype of targets that are 0 or 1, beside those of DType.
enum : int { kByte = 3 };

// Statistics that are computed only when asked for, and what the values of `logits` are.
enum RegionWant : int {
  kRegionSquares = 1,
  kRegionCrossEntropy = 2,
  kRegionEntropy = 4,
  kRegionSharp = 8,         // p becomes sigmoid(sharpness (p - 1/2))
  kRegionProbabilities = 16 // `logits` holds probabilities, and p is what stands there
};

// Rows of `stats`: the soft confusion matrix and sums beside it. With p = sigmoid(x), q = 1 - p, over what counts:
enum RegionStat : int {
  kRegionCount,
  kLabelled,       // sum t
  kTruePositive,   // sum p t
  kFalsePositive,  // sum p (1 - t)
  kFalseNegative,  // sum q t
  kTrueNegative,   // sum q (1 - t)
  kSquaredError,   // sum (p - t)^2
  kLabelledSquare, // sum t^2
  kCrossEntropy,   // sum of t softplus(-x) + (1 - t) softplus(x)
  kBinaryEntropy,  // sum of p softplus(-x) + q softplus(x)
  kNumRegionStats
};

// Rows of `coef`: dL/dx = (positive t + negative (1 - t) + square (p - t)) dp/dx + cross_entropy (p - t) - entropy x p
// q, the p of the last two before it is sharpened.
enum RegionCoef : int { kOnPositive, kOnNegative, kOnSquare, kOnCrossEntropy, kOnEntropy, kNumRegionCoefs };

// One pass over regions of `size` values that lie one after another. With `coef` the gradient, else the statistics. All
// pointers are device pointers for the CUDA launcher.
struct RegionStats {
  const void *logits;  // [n][size] dtype
  const void *target;  // [n][size] target_dtype
  const uint8_t *mask; // [n / mask_share][size], 0 where a value does not count; or null
  const float *coef;   // [kNumRegionCoefs][n], or null
  float *stats;  // [kNumRegionStats][n]; of the CUDA kernel [kNumRegionStats][slices][n], to be summed over slices
  void *dlogits; // [n][size] dtype
  int64_t n, size, mask_share; // as many regions in a row share one row of the mask
  int dtype, target_dtype, want;
  float sharpness;
};

} // namespace fastloss
