// The loops over the values of one region, for every instruction set and dtype, and what they take and return.
#pragma once
#include "cpu.h"
#include "region_stats.h"
#include "simd.h"

namespace fastloss {
namespace {

constexpr uint8_t kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// Some values of one region, as the loops need them.
struct Region {
  const void *logits, *target;
  const uint8_t *mask; // or null
  void *out;
  float coef[kNumRegionCoefs];
  int want;
  float sharpness;
  bool stream;
};

struct RegionSums {
  double value[kNumRegionStats];
};

struct RegionLoops {
  RegionSums (*sums)(const Region &, int64_t count);
  void (*gradient)(const Region &, int64_t count);
};

} // namespace

#define FASTLOSS_LOOPS "region_stats.inc"
#include "each_isa.inc"
#undef FASTLOSS_LOOPS

namespace {

template <class T, class U> RegionLoops region_loops_for(int isa, bool rich) {
#ifdef __x86_64__
  if (isa == kAvx512Bf16) return avx512bf16::region_loops_of<T, U>(rich);
  if (isa == kAvx512) return avx512::region_loops_of<T, U>(rich);
  if (isa == kAvx2) return avx2::region_loops_of<T, U>(rich);
#endif
  return scalar::region_loops_of<T, U>(rich);
}

// Targets are bytes, floats, or of the dtype of the logits.
template <class T> RegionLoops region_loops_for(int target_dtype, int isa, bool rich) {
  return target_dtype == kByte      ? region_loops_for<T, uint8_t>(isa, rich)
         : target_dtype == kFloat32 ? region_loops_for<T, float>(isa, rich)
                                    : region_loops_for<T, T>(isa, rich);
}

RegionLoops region_loops_for(int dtype, int target_dtype, int isa, bool rich) {
  return dtype == kFloat32   ? region_loops_for<float>(target_dtype, isa, rich)
         : dtype == kFloat16 ? region_loops_for<Float16>(target_dtype, isa, rich)
                             : region_loops_for<BFloat16>(target_dtype, isa, rich);
}

} // namespace
} // namespace fastloss
