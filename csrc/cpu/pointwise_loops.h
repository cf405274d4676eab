// The loops of pointwise_loss.inc for every instruction set, and what they take and return.
#pragma once
#include "cpu.h"
#include "simd_log.h"

namespace fastloss {
namespace {

// Some elements, all fp32 and readable up to a whole vector.
struct Block {
  const float *input, *target, *weight, *pos_weight;
  float *values, *slopes;
  float factor; // multiplies the slopes
};

struct BlockLoops {
  float (*sum)(const Block &, int64_t);
  float (*values)(const Block &, int64_t);
  float (*slopes)(const Block &, int64_t);
  float (*sum_and_slopes)(const Block &, int64_t);
  float fill; // an input that with target 0 has the loss 0, for what a block lacks to a whole vector
};

struct Level {
  BlockLoops (*loops_for)(int kind, bool weighted);
  void (*widen[3])(const void *, int64_t, float, float *); // by DType
  void (*narrow[3])(const float *, int64_t, bool, void *);
  void (*multiply_by)(float *, const float *, int64_t);
  int64_t width;
};

} // namespace

#define FASTLOSS_LOOPS "pointwise_loss.inc"
#include "each_isa.inc"
#undef FASTLOSS_LOOPS

namespace {

Level level_of(int isa) {
#ifdef __x86_64__
  if (isa == kAvx512Bf16) return avx512bf16::level();
  if (isa == kAvx512) return avx512::level();
  if (isa == kAvx2) return avx2::level();
#endif
  return scalar::level();
}

} // namespace
} // namespace fastloss
