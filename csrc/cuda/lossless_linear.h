// The launcher of lossless_linear on CUDA; docs/design.md, "The lossless contract". No torch, no CUDA header.
#pragma once
#include "cuda.h"
#include "lossless.h"

namespace fastloss {

constexpr int64_t kMostLosslessInputs = 64; // rows of x; for more, decoding once and a library's product cost less

// out[i, r] = sum over k of x[i, k] W[r, k] + bias[r], summed in fp32 in an order of its own, rounded once.
struct CudaLosslessLinear {
  Compressed w;     // P7 of bf16 with its byte plane, columns a multiple of 128, aligned to 16 bytes
  const void *x;    // bf16 [n, columns], aligned to 16 bytes
  int64_t n;        // 1 to kMostLosslessInputs
  const void *bias; // bf16 [rows], or null
  void *out;        // bf16 [n, rows]
  float *parts;     // scratch [splits, n, rows] where lossless_linear_plan says so
};

struct LosslessLinearPlan {
  int splits;   // blocks that share rows, each with a part of the columns
  bool cluster; // they add up in shared memory; else by way of `parts` and a second kernel, unless splits is 1
};

LosslessLinearPlan lossless_linear_plan(int64_t rows, int64_t columns, const DeviceLimits &);
void lossless_linear_launch(const CudaLosslessLinear &, LosslessLinearPlan, void *stream);
void lossless_linear_cuda(const CudaLosslessLinear &, int device, void *stream);

} // namespace fastloss
