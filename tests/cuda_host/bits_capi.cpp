// C functions over the launchers of the bit kernels, for ctypes: an error comes back as text.
#include "bit_products.h"

#include <exception>
#include <string>

namespace {
template <class F> const char *guard(F f) {
  static std::string text;
  try {
    f();
    return nullptr;
  } catch (const std::exception &e) {
    text = e.what();
    return text.c_str();
  }
}
} // namespace

const fastloss::DeviceLimits &fastloss::device_limits(int) {
  static const DeviceLimits h200{132, 8, 227 << 10, 228 << 10, 90};
  return h200;
}

extern "C" {
const char *c_bgemm(const fastloss::CudaBgemm *p, bool int8, int tile) {
  return guard([&] { fastloss::bgemm_launch(*p, {int8, tile}, nullptr); });
}
const char *c_topk(const fastloss::CudaHammingTopk *p, bool int8) {
  return guard([&] { fastloss::hamming_topk_launch(*p, int8, nullptr); });
}
// 4 int8 + tile, for a GPU with so many multiprocessors.
int c_bgemm_plan(int64_t m, int64_t n, int multiprocessors, int capability, int shared) {
  const fastloss::DeviceLimits device{multiprocessors, 8, size_t(shared), size_t(shared), capability};
  const fastloss::BgemmPlan plan = fastloss::bgemm_plan(m, n, device);
  return 4 * plan.int8 + plan.tile;
}
int c_topk_splits(int64_t m, int64_t n, int multiprocessors) {
  return fastloss::hamming_topk_splits(m, n, {multiprocessors, 8, 227 << 10, 228 << 10, 90});
}
}
