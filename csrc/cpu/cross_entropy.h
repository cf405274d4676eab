// Cross entropy around the row kernel on the CPU: what each row's loss weighs, and the loss from the statistics.
// In C++ because on small problems a dozen tensor operations on vectors cost more than the kernel.
#pragma once
#include "../fastloss.h"

namespace fastloss {

struct CrossEntropyTerms {
  const int64_t *target;     // [n], or null: target probabilities
  const float *class_weight; // [v], or null: all one
  int64_t n, v, ignore_index;
  double label_smoothing, z_loss;
  bool mean; // else the sum
};

// Fills `epilogue` [kNumEpilogues][n] for an upstream gradient of 1; returns the factor 1 / denominator in it.
double cross_entropy_epilogue(const CrossEntropyTerms &terms, float *epilogue);

// sum over the valid rows of nll b - s sum_j c_j (lse - z_j) + t lse^2, with b, s, t from the epilogue.
double cross_entropy_loss(const CrossEntropyTerms &terms, const float *epilogue, const float *stats);

// sum over the valid rows of nll phi(d): phi a loss of the margin (margin_loss.h), nll its weight in the epilogue.
double margin_loss_sum(const CrossEntropyTerms &terms, int loss, double a, double b, const float *epilogue,
                       const float *stats);

} // namespace fastloss
