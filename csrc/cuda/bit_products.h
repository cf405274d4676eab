// The launchers of products of bits on CUDA; docs/design.md, "The bit contract". No torch, no CUDA header.
#pragma once
#include "bits.h"
#include "cuda.h"

namespace fastloss {

// What a tile of the product becomes; below 3, FloatType of fastloss.h.
enum BitOutput : int { kOutInt32 = 3, kOutSigns = 4 };

// out[i, j] = activation(((sum over k of a_ik b_jk) row_scale_i) column_scale_j + bias_j), each step rounded to fp32.
struct CudaBgemm {
  Planes a, b;
  const float *row_scale, *column_scale, *bias; // null: 1, 1, 0
  int activation;
  int output;         // kFloat32, kFloat16, kBFloat16, or a BitOutput; kOutInt32 is the sum itself
  void *out;          // [M, N], or with kOutSigns the plane [M, row_bytes(N)]
  int32_t *popcounts; // [M] of that plane, zeros before
};

// The `count` largest sums of each row of a (times scale_j), falling, the lowest column first among equals.
struct CudaHammingTopk {
  Planes a, b;
  const float *scale; // [N] or null
  int64_t count;      // 1 to the rows of b
  int64_t *keys;      // scratch [M, splits, count]
  int splits;         // parts of the rows of b, each with a list of its own; hamming_topk_splits says how many
  void *values;       // [M, count], int32, or float with a scale
  int64_t *index;     // [M, count]
};

// Which kernel runs: bits on the tensor cores for bits, or as bytes on those for int8; and its tiles, 64 x 64, 128 x
// 128 or 256 x 128.
struct BgemmPlan {
  bool int8;
  int tile; // 0, 1, 2
};
constexpr int kAutomatic = -1; // `plan`: as the device wants it; else 4 int8 + tile

BgemmPlan bgemm_plan(int64_t m, int64_t n, const DeviceLimits &);
void bgemm_launch(const CudaBgemm &, BgemmPlan, void *stream);
void bgemm_cuda(const CudaBgemm &, int plan, int device, void *stream);

constexpr int64_t kLongestList = 1024;
int hamming_topk_splits(int64_t m, int64_t n, const DeviceLimits &);
void hamming_topk_launch(const CudaHammingTopk &, bool int8, void *stream);
void hamming_topk_cuda(const CudaHammingTopk &, int plan, int device, void *stream);

} // namespace fastloss
