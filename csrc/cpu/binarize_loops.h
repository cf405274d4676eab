// The loops of binarize.inc for every instruction set, and what they take and return.
#pragma once
#include "binarize.h"
#include "binarize_slopes.h"
#include "bit_blocks.h"
#include "simd_lanes.h"
#include "simd_log.h"

namespace fastloss {
namespace {

struct SlopeOf {
  double p0, p1;
  ReStePower power;
};

// All over blocks that are fp32 in L1 and readable up to a whole vector; bits are rows of kRowBytes.
struct BinarizeLoops {
  void (*widen[3])(const void *, int64_t, float, float *); // by DType
  void (*narrow[3])(const float *, int64_t, bool, void *);
  void (*subtract)(const float *x, const float *shift, int64_t, float *u);
  void (*wave_signs)(const float *u, int64_t, float w, float *wave);
  int (*signs)(const float *u, int64_t, uint8_t *bits);
  void (*mask)(const float *u, int64_t, float limit, uint8_t *bits); // of clip
  void (*mask_of_slope)(float *factor, int64_t, uint8_t *bits);
  void (*codes)(const float *u, int64_t, float limit, uint8_t *codes);
  void (*signed_by)(const uint8_t *bits, const float *x, int64_t, float *y);
  void (*slope[7])(const float *u, int64_t, const SlopeOf &, float *factor); // by Surrogate
  void (*slope_of_mask)(const uint8_t *bits, int64_t, float *factor);
  void (*slope_of_codes)(const uint8_t *codes, int64_t, const float *table, float *factor);
  void (*gradient[3])(const float *grad, const float *scale, const float *factor, int64_t, bool, void *dx); // by DType
  double (*sum)(const float *terms, int64_t);
  void (*add_terms)(double *sums, const float *terms, int64_t);
  int64_t width;
};

} // namespace

#define FASTLOSS_LOOPS "binarize.inc"
#include "each_isa.inc"
#undef FASTLOSS_LOOPS

namespace {

BinarizeLoops binarize_loops_for(int isa) {
  const int level = level_for(isa);
#ifdef __x86_64__
  if (level == kAvx512Bf16) return avx512bf16::binarize_loops();
  if (level == kAvx512) return avx512::binarize_loops();
  if (level == kAvx2) return avx2::binarize_loops();
#endif
  (void)level;
  return scalar::binarize_loops();
}

} // namespace
} // namespace fastloss
