// The slopes of the surrogates of sign, one number at a time in double: for tables, and for arguments of waves that
// single precision cannot reduce. docs/design.md, "binarize".
#pragma once
#include "../bits.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace fastloss {

constexpr double kPi = 3.14159265358979323846;
constexpr double kResteLinear = 0.1; // below this, ReSTE's power is replaced by a line

// t: beyond it the slope is 0, and a code 255.
inline double surrogate_limit(int surrogate, double p0, double p1) {
  if (surrogate == kClip) return p0;
  if (surrogate == kReste) return p1;
  if (surrogate == kSwish) return 10 / (p0 == 0 ? 1 : p0);
  return surrogate == kApprox || surrogate == kFda ? 1 : std::numeric_limits<double>::infinity();
}

inline double reste_line(double order) { return std::pow(kResteLinear, 1 / order) / kResteLinear; }

// sum over i = 0..n of cos((2 i + 1) angle) = sin(2 (n + 1) angle) / (2 sin angle); both sines from the distance to the
// nearest multiple of pi, so that their errors cancel where both are small.
inline double cosine_sum(double angle, double terms) {
  const double steps = std::nearbyint(angle / kPi);
  constexpr double kPiRest = 1.2246467991473532e-16;
  const double near = std::fma(-steps, kPiRest, std::fma(-steps, kPi, angle)), many = 2 * terms;
  const double sum = std::fabs(near) < 1e-30 ? terms : std::sin(many * near) / (2 * std::sin(near));
  return std::fmod(steps, 2) == 0 ? sum : -sum;
}

inline double surrogate_slope(double u, int surrogate, double p0, double p1) {
  const double a = std::fabs(u);
  switch (surrogate) {
  case kIdentity:
    return 1;
  case kClip:
    return a < p0;
  case kApprox:
    return a < 1 ? 2 - 2 * a : 0;
  case kReste:
    return !(a <= p1) ? 0 : a <= kResteLinear ? reste_line(p0) : std::pow(a, (1 - p0) / p0) / p0;
  case kBiper:
    return p0 * std::cos(p0 * u);
  case kSwish: {
    const double x = std::min(p0 * a, 80.0);
    return a != a ? 0 : p0 * (2 - x * std::tanh(x / 2)) / (1 + std::cosh(x));
  }
  default:
    return a <= 1 ? 4 * p0 / kPi * cosine_sum(p0 * u, std::floor(p1) + 1) : 0;
  }
}

// a^((1 - order) / order) / order for a = fraction 2^exponent, the fraction in [sqrt(1/2), sqrt(2)): the fraction's
// share is a polynomial in x = kStretch fraction - kMiddle in [-1, 1], interpolated where a Chebyshev polynomial is 0
// (relative error 1e-8).
struct ReStePower {
  static constexpr int kDegree = 10;
  static constexpr float kStretch = 2.82842712f, kMiddle = 3.f; // 2 / (sqrt(2) - sqrt(1/2)), and that times the middle
  float coefficients[kDegree + 1] = {};
  float power = 0, rest = 0; // the exponent's power, in two parts

  ReStePower() = default;
  explicit ReStePower(double order) {
    const double exponent = (1 - order) / order;
    power = float(exponent), rest = float(exponent - power);
    constexpr int kNodes = kDegree + 1;
    double shares[kNodes] = {}; // of each Chebyshev polynomial, whose values at a node are made by their recurrence
    for (int j = 0; j < kNodes; ++j) {
      const double node = std::cos(kPi * (j + 0.5) / kNodes);
      const double value = std::pow((node + kMiddle) / kStretch, exponent) / order;
      double last = node, polynomial = 1;
      for (int i = 0; i < kNodes; ++i) {
        shares[i] += value * polynomial * (i == 0 ? 1 : 2) / kNodes;
        last = std::exchange(polynomial, 2 * node * polynomial - last);
      }
    }
    double before[kNodes] = {}, now[kNodes] = {1}, sums[kNodes] = {}; // the polynomials as powers of x
    for (int i = 0; i < kNodes; ++i) {
      for (int k = 0; k <= i; ++k) sums[k] += shares[i] * now[k];
      for (int k = kNodes - 1; k >= 0; --k)
        before[k] = std::exchange(now[k], (i == 0 ? 1 : 2) * (k ? now[k - 1] : 0) - before[k]);
    }
    for (int i = 0; i < kNodes; ++i) coefficients[i] = float(sums[i]);
  }
};

} // namespace fastloss
