// Losses of the margin d = z_y - log sum of e^z over the other columns, by their slopes phi'(d): with one of them a
// kernel makes the gradient phi'(d) (1[j = y] - pi_j) while the row is still in cache. Their values are made in Python
// (python/fastloss/losses), their parameters in python/fastloss/margin_loss.py.
#pragma once
#include <cmath>

#ifdef __CUDACC__
#define FASTLOSS_HOST_DEVICE __host__ __device__
#else
#define FASTLOSS_HOST_DEVICE
#endif

namespace fastloss {

enum MarginLoss : int {
  kNoMarginLoss,       // cross entropy, as the epilogue has it
  kCompSum,            // a: tau; b: the exponent from which it goes on as a straight line
  kTruncatedCompSum,   // (1 - p^a) / a, flat where p <= b
  kFocal,              // a: gamma
  kUnlikelihood,       // -log(1 - p)
  kSymmetric,          // (1 - a) (-log p) + a b (1 - p)
  kAsymmetricUnhinged, // ((a - p)^b - (a - 1)^b) / b
  kAsymmetricGeneral,  // ((a + 1)^b - (a + p)^b) / b
  kShifted,            // b softplus(a - d): LDR-KL
  kPassAtN             // -log(1 - (1 - p)^a)
};

namespace margin {

FASTLOSS_HOST_DEVICE inline double softplus(double x) { return (x > 0 ? x : 0) + log1p(exp(-fabs(x))); }
FASTLOSS_HOST_DEVICE inline double sigmoid(double x) { return x > 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x)); }
// x > 0; on a GPU pow is a call, which costs the registers of every loop around it
FASTLOSS_HOST_DEVICE inline double power(double x, double exponent) { return exp(exponent * log(x)); }
// log(1 - e^x), x < 0
FASTLOSS_HOST_DEVICE inline double log1mexp(double x) { return x > -0.693147 ? log(-expm1(x)) : log1p(-exp(x)); }

// d/dd of -log(1 - (1 - p)^n): -(1 - p) F. Where n p is small, F is a series: the closed form is 0 / 0 there.
FASTLOSS_HOST_DEVICE inline double pass_at_n(double n, double d) {
  const double log_p = -softplus(-d), log_miss = -softplus(d), log_n = log(n);
  if (log_p + log_n < -6.907755) return -sigmoid(-d) * (1 - (n - 1) / 2 * exp(log_p));
  return -exp(log_n + log_p + n * log_miss - log1mexp(n * log_miss));
}

} // namespace margin

FASTLOSS_HOST_DEVICE inline double margin_slope(int loss, double a, double b, double d) {
  using namespace margin;
  if (d == HUGE_VAL) return 0; // the target is the only column
  if (d < -1e30) d = -1e30;    // 0 * inf never
  const double p = sigmoid(d), miss = sigmoid(-d);
  switch (loss) {
  case kCompSum: {
    const double exponent = (1 - a) * softplus(-d);
    return -exp(exponent < b ? exponent : b) * miss;
  }
  case kTruncatedCompSum:
    return p <= b ? 0 : -exp(-a * softplus(-d)) * miss;
  case kFocal:
    return -exp(-a * softplus(d)) * (a * p * softplus(-d) + miss);
  case kUnlikelihood:
    return p;
  case kSymmetric:
    return -(1 - a) * miss - a * b * p * miss;
  case kAsymmetricUnhinged:
    return -power(a - p, b - 1) * p * miss;
  case kAsymmetricGeneral:
    return -power(a + p, b - 1) * p * miss;
  case kShifted:
    return -b * sigmoid(a - d);
  case kPassAtN:
    return pass_at_n(a, d);
  default:
    return -miss;
  }
}

// phi(d) itself; `classes` is V, for kShifted.
inline double margin_value(int loss, double a, double b, double d, double classes) {
  using namespace margin;
  const double p = sigmoid(d), miss = sigmoid(-d), nll = softplus(-d);
  switch (loss) {
  case kCompSum: {
    const double x = (1 - a) * nll, near = x < b ? x : b;
    return (expm1(near) + (x > b ? (x - b) * exp(b) : 0)) / (1 - a);
  }
  case kTruncatedCompSum:
    return p <= b ? (1 - pow(b, a)) / a : -expm1(-a * nll) / a;
  case kFocal:
    return a == 0 || d == -HUGE_VAL ? nll : exp(-a * softplus(d)) * nll;
  case kUnlikelihood:
    return softplus(d);
  case kSymmetric:
    return (1 - a) * nll + a * b * miss;
  case kAsymmetricUnhinged:
    return pow(a - 1, b) * expm1(b * log1p(miss / (a - 1))) / b;
  case kAsymmetricGeneral:
    return -pow(a + 1, b) * expm1(b * log1p(-miss / (a + 1))) / b;
  case kShifted:
    return b * (softplus(a - d) - log(classes));
  case kPassAtN: {
    const double log_np = log(a) - nll, fail = -a * softplus(d);
    return log_np < -18.420681 ? (a - 1) / 2 * exp(-nll) - log_np : -log1mexp(fail);
  }
  default:
    return nll;
  }
}

} // namespace fastloss
