// The loops over the columns of one row, for every instruction set and dtype, and what they take and return.
#pragma once
#include "cpu.h"
#include "simd.h"

namespace fastloss {
namespace {

constexpr int64_t kSmallestBlock = 256; // of the lean loops of any instruction set
constexpr float kColdest = -1e30f;      // stands for -inf where it meets a power that is 0

struct Columns {
  int64_t begin, end;
};

// What the loops find in some columns of a row. Lean: `sum` is of 2^(c logit - exponent). General: of e^(z - ref).
struct Sums {
  float top = -kInfinity, exponent = 0, best = -kInfinity;
  int64_t best_column = 0;
  double sum = 0, weighted = 0, tempered = 0, total = 0, squares = 0, picked = 0, mass = 0;
};

// One row, as the loops need it. The coefficients are those of the contract over the sums they belong to.
struct Line {
  const void *logits, *prob;
  void *out;
  const float *column_weight;
  int64_t target, argmax; // columns, or -1
  int want;
  bool prob_is_float, stream;
  float scale, softcap, sign, ref, warmth; // sign of the scale; log2(e) / temperature
  float exponent_scale, exponent;          // lean: powers are 2^(exponent_scale logit - exponent)
  float *kept, *kept_exponents;            // lean, 16 bits, kBoth: this row's powers, and the exponent of each block
  float factor, factor_z, factor_t, own, column, linear, arg;
};

struct Loops {
  float (*largest_rest)(const Line &, Columns);
  Sums (*lean_sums)(const Line &, Columns);
  Sums (*lean_sums_kept)(const Line &, Columns);
  void (*lean_gradient)(const Line &, Columns);
  Sums (*general_sums)(const Line &, Columns);
  void (*general_gradient)(const Line &, Columns);
};

} // namespace

#define FASTLOSS_LOOPS "row_stats.inc"
#include "each_isa.inc"
#undef FASTLOSS_LOOPS

namespace {

template <class T> Loops loops_for(int isa) {
#ifdef __x86_64__
  if (isa == kAvx512Bf16) return avx512bf16::loops_of<T>();
  if (isa == kAvx512) return avx512::loops_of<T>();
  if (isa == kAvx2) return avx2::loops_of<T>();
#endif
  return scalar::loops_of<T>();
}

Loops loops_for(int dtype, int isa) {
  return dtype == kFloat32   ? loops_for<float>(isa)
         : dtype == kFloat16 ? loops_for<Float16>(isa)
                             : loops_for<BFloat16>(isa);
}

} // namespace
} // namespace fastloss
