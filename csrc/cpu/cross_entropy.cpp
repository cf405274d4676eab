#include "cross_entropy.h"

#include "../margin_loss.h"

#include <cmath>
#include <limits>

namespace fastloss {
namespace {

double softplus(double d) { return (d > 0 ? d : 0) + std::log1p(std::exp(-std::fabs(d))); }

double weight_sum(const CrossEntropyTerms &terms) {
  if (!terms.class_weight) return double(terms.v);
  double sum = 0;
  for (int64_t j = 0; j < terms.v; ++j) sum += terms.class_weight[j];
  return sum;
}

bool is_class(const CrossEntropyTerms &terms, int64_t y) { return y >= 0 && y < terms.v; }

double target_weight(const CrossEntropyTerms &terms, int64_t row) {
  if (!terms.target || !terms.class_weight) return 1;
  return is_class(terms, terms.target[row]) ? terms.class_weight[terms.target[row]] : 0;
}

bool ignored(const CrossEntropyTerms &terms, int64_t row) {
  return terms.target && terms.target[row] == terms.ignore_index;
}

} // namespace

double cross_entropy_epilogue(const CrossEntropyTerms &terms, float *epilogue) {
  double denominator = terms.mean ? 0 : 1;
  if (terms.mean) {
    for (int64_t i = 0; i < terms.n; ++i)
      if (!ignored(terms, i)) denominator += target_weight(terms, i);
  }
  const double share = 1 / denominator, smoothing = terms.label_smoothing;
  const double lse = smoothing == 0 ? 0 : smoothing / double(terms.v) * weight_sum(terms) * share;
  for (int64_t i = 0; i < terms.n; ++i) {
    epilogue[kNll * terms.n + i] = float((1 - smoothing) * target_weight(terms, i) * share);
    epilogue[kLse * terms.n + i] = float(lse);
    epilogue[kLseSq * terms.n + i] = float(terms.z_loss == 0 ? 0 : terms.z_loss * share);
    epilogue[kSumWeight * terms.n + i] = float(smoothing == 0 ? 0 : -smoothing / double(terms.v) * share);
  }
  return share;
}

double cross_entropy_loss(const CrossEntropyTerms &terms, const float *epilogue, const float *stats) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const double columns = terms.label_smoothing == 0 ? 0 : weight_sum(terms);
  double loss = 0;
  bool any = false;
  for (int64_t i = 0; i < terms.n; ++i) {
    if (ignored(terms, i)) continue;
    any = true;
    auto stat = [&](int which) { return double(stats[which * terms.n + i]); };
    auto weight = [&](int which) { return double(epilogue[which * terms.n + i]); };
    const double ref = stat(kMax) == -infinity ? 0 : stat(kMax), logsum = stat(kLogSum);
    double gap = logsum, nll; // gap = lse - ref
    if (terms.target) {
      // A target of +inf has no margin: in torch it is inf - inf.
      const double d = stat(kTarget) == infinity ? std::nan("") : (stat(kTarget) - ref) - logsum;
      nll = softplus(-d);
      gap = logsum == -infinity ? stat(kTarget) - ref : logsum + softplus(d);
    } else {
      nll = stat(kMass) * gap - stat(kTarget);
    }
    loss += weight(kNll) * nll;
    if (terms.label_smoothing != 0) loss -= weight(kSumWeight) * (columns * gap - stat(kSumRow));
    if (terms.z_loss != 0) loss += weight(kLseSq) * (ref + gap) * (ref + gap);
  }
  return any || !terms.mean ? loss : std::nan(""); // as in torch, the mean over no rows is 0 / 0
}

double margin_loss_sum(const CrossEntropyTerms &terms, int loss, double a, double b, const float *epilogue,
                       const float *stats) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  double sum = 0;
  bool any = false;
  for (int64_t i = 0; i < terms.n; ++i) {
    if (ignored(terms, i)) continue;
    any = true;
    const double max = stats[kMax * terms.n + i], own = stats[kTarget * terms.n + i];
    const double ref = max == -infinity ? 0 : max, logsum = stats[kLogSum * terms.n + i];
    const double d = own == infinity ? std::nan("") : (own - ref) - logsum;
    sum += epilogue[kNll * terms.n + i] * margin_value(loss, a, b, d, double(terms.v));
  }
  return any || !terms.mean ? sum : std::nan("");
}

} // namespace fastloss
