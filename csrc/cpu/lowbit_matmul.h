// Rows of numbers times a matrix of low-bit integers that stays packed: docs/design.md, "The bit contract".
#pragma once
#include "../bits.h"

namespace fastloss {

constexpr int kInt8 = 3; // a dtype of x beside those of fastloss.h

struct LowbitMatmul {
  const void *x;        // [m][ldx] of x_dtype
  Planes w;             // r rows of k columns
  const float *scale;   // [scale_rows][groups], or null: 1
  const float *x_scale; // [m] of an int8 x, or null: 1
  const float *bias;    // [r], or null; not with `transposed`
  void *y;              // [m][r], or with `transposed` [m][k], of y_dtype
  int64_t m, ldx, scale_rows, groups, group;
  bool transposed;
  int x_dtype, y_dtype;
};

// isa: -1 the best of this machine, a level of cpu.h, or one more (kAmxBf16 of linear_cross_entropy.h) for AMX tiles.
// Same result, bit for bit, with any number of threads.
void lowbit_matmul_cpu(const LowbitMatmul &args, int isa);

} // namespace fastloss
