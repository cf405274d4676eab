// x Wᵀ + bias of a matrix in P7, layout rows, bf16, without decoding it to memory: docs/design.md, "The lossless
// contract".
#pragma once
#include "../lossless.h"

namespace fastloss {

struct LosslessLinear {
  Compressed weight;
  const uint16_t *x; // [n][columns] bf16
  int64_t n;
  const uint16_t *bias; // [rows] or null
  uint16_t *out;        // [n][rows]
};

// False, and nothing is written, where x holds an infinity or a NaN: a zero for an escape times these would be NaN.
// isa as in cpu.h; the best one is AMX.
bool lossless_linear_cpu(const LosslessLinear &args, int isa);

} // namespace fastloss
