// Linear cross entropy on the CPU: logits = x w^T + bias are never stored as a whole; the gradients are made in the
// forward. The statistics, the epilogue and their formulas are those of docs/design.md.
#pragma once
#include <cstdint>

#include "cpu.h"

namespace fastloss {

// One level above those of cpu.h, for this kernel only: bf16 products in AMX tiles.
constexpr int kAmxBf16 = kAvx512Bf16 + 1;

struct LinearCrossEntropy {
  const void *x;              // [n][ldx] dtype
  const void *w;              // [v][ldw] dtype
  const float *bias;          // [v] or null
  const int64_t *target;      // [n], or null: every column is "rest" and kTarget is -inf
  const float *column_weight; // [v] c_j, or null: all one (read only with kSum)
  const float *epilogue;      // [kNumEpilogues][n], or null: statistics only
  float *stats;               // [kNumStats][n]
  void *dx;                   // [n][d] dtype, or null
  void *dw;                   // [v][d] dtype, or null
  float *dbias;               // [v], or null
  float *dw_accumulator;      // scratch [v][d] for the sums over chunks of tokens, or null: allocated when needed
  int64_t n, d, v, ldx, ldw, ignore_index;
  int64_t max_extra_bytes; // bound of the scratch that grows with tokens, hence of a chunk; 0: 1/8 of the logits.
                           // Not counted: the accumulator, and a thread's scratch (about 2.5 MB at d = 512)
  int dtype, want;         // of Want only kSum: the other statistics are not here
  int margin_loss;         // as in RowStats
  float margin_a, margin_b;
  float scale, softcap; // z = softcap * tanh(scale * logit / softcap); softcap 0: z = scale * logit
};

// Why this machine or these arguments are not for the kernel, or null. Reads sizes, flags and whether a pointer is
// null; never what a pointer points to.
const char *linear_cross_entropy_why_not(const LinearCrossEntropy &args, int isa);

// Call only where the query above answers null. Same result, bit for bit, with any number of threads.
void linear_cross_entropy_cpu(const LinearCrossEntropy &args, int isa);

} // namespace fastloss
