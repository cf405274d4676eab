// A C function over the launcher of lossless_linear, for ctypes: an error comes back as text.
#include "lossless_linear.h"

#include <exception>
#include <string>

const fastloss::DeviceLimits &fastloss::device_limits(int) {
  static const DeviceLimits h200{132, 8, 227 << 10, 228 << 10, 90};
  return h200;
}

namespace {
const char *launch(const fastloss::CudaLosslessLinear &p, fastloss::LosslessLinearPlan plan) {
  static std::string text;
  try {
    fastloss::lossless_linear_launch(p, plan, nullptr);
    return nullptr;
  } catch (const std::exception &e) {
    text = e.what();
    return text.c_str();
  }
}
} // namespace

extern "C" {
const char *c_lossless_linear(const fastloss::CudaLosslessLinear *p, int splits, bool cluster) {
  return launch(*p, {splits, cluster});
}
// The arguments of the binding; parts of a blob by way of memory.
const char *c_lossless_linear_blob(const void *x, int64_t n, const uint8_t *blob, const void *bias, void *out,
                                   float *parts, const int64_t *plan, int splits) {
  return launch({fastloss::compressed_at(blob, plan), x, n, bias, out, parts}, {splits, false});
}
// 2 splits + cluster, for a GPU with so many multiprocessors.
int c_lossless_linear_plan(int64_t rows, int64_t columns, int multiprocessors, int max_cluster) {
  const auto plan =
      fastloss::lossless_linear_plan(rows, columns, {multiprocessors, max_cluster, 227 << 10, 228 << 10, 90});
  return 2 * plan.splits + plan.cluster;
}
}
