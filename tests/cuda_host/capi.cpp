// C functions over the launchers, for ctypes: an error comes back as text. In the package, pybind11 does this.
#include "cuda.h"

#include <exception>
#include <string>

namespace {
fastloss::DeviceLimits limits;

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

// device.cu asks a driver for this; here the test says what the device is like.
const fastloss::DeviceLimits &fastloss::device_limits(int) { return limits; }

// Planted faults are built with the one kernel that they are in.
extern "C" {
#ifndef ONLY_row_terms
const char *c_launch(const fastloss::RowStats *p, const fastloss::RowStatsPlan *plan) {
  return guard([&] { fastloss::row_stats_launch(*p, *plan, nullptr); });
}
const char *c_run(const fastloss::RowStats *p, const fastloss::DeviceLimits *device) {
  limits = *device;
  return guard([&] { fastloss::row_stats_cuda(*p, 0, nullptr); });
}
void c_plan(const fastloss::RowStats *p, const fastloss::DeviceLimits *device, fastloss::RowStatsPlan *plan) {
  *plan = fastloss::row_stats_plan(*p, *device);
}
const char *c_why_not(const fastloss::RowStats *p) { return fastloss::row_stats_cuda_why_not(*p); }
#endif
#ifndef ONLY_row_stats
const char *c_terms(const fastloss::RowTerms *p, const fastloss::RowStatsPlan *plan) {
  return guard([&] { fastloss::row_terms_launch(*p, *plan, nullptr); });
}
const char *c_terms_run(const fastloss::RowTerms *p, const fastloss::DeviceLimits *device) {
  limits = *device;
  return guard([&] { fastloss::row_terms_cuda(*p, 0, nullptr); });
}
void c_terms_plan(const fastloss::RowTerms *p, const fastloss::DeviceLimits *device, fastloss::RowStatsPlan *plan) {
  *plan = fastloss::row_terms_plan(*p, *device);
}
#endif
#if !defined(ONLY_row_stats) && !defined(ONLY_row_terms)
const char *c_sample(const fastloss::RowSample *p, const fastloss::RowSamplePlan *plan) {
  return guard([&] { fastloss::row_sample_launch(*p, *plan, nullptr); });
}
const char *c_sample_run(const fastloss::RowSample *p, const fastloss::DeviceLimits *device) {
  limits = *device;
  return guard([&] { fastloss::row_sample_cuda(*p, 0, nullptr); });
}
const char *c_scale(void *x, int dtype, int64_t n, const float *factor, const fastloss::DeviceLimits *device) {
  limits = *device;
  return guard([&] { fastloss::scale_cuda(x, dtype, n, factor, 0, nullptr); });
}
const char *c_region_stats(const fastloss::RegionStats *p, int slices) {
  return guard([&] { fastloss::region_stats_cuda(*p, slices, 0, nullptr); });
}
const char *c_pointwise(const fastloss::PointwiseLoss *p, const fastloss::DeviceLimits *device) {
  limits = *device;
  return guard([&] { fastloss::pointwise_loss_cuda(*p, 0, nullptr); });
}
const char *c_edge_dot(const fastloss::EdgeDot *p) {
  return guard([&] { fastloss::edge_dot_cuda(*p, 0, nullptr); });
}
const char *c_edge_sum(const fastloss::EdgeSum *p) {
  return guard([&] { fastloss::edge_sum_cuda(*p, 0, nullptr); });
}
#endif
}
