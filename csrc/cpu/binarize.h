// sign with the gradient of a surrogate, on the CPU: docs/design.md, "binarize".
#pragma once
#include "../bits.h"

namespace fastloss {

struct Parameter {
  const float *values; // null: absent
  int64_t count;       // 1, or the number of groups
};

// What is null is not asked for.
struct Binarize {
  const void *x; // [rows][columns] dtype
  Parameter shift, scale;
  int64_t rows, columns, groups, inner;
  int dtype, surrogate;
  double p0, p1;
  void *y;            // [rows][columns] dtype
  uint8_t *signs;     // [rows][row_bytes(columns)]
  int32_t *popcounts; // [rows], zeros; with signs
  uint8_t *mask;      // as signs: where the slope is not 0
  uint8_t *codes;     // [rows][columns]; not kIdentity, not kBiper
};

struct BinarizeBackward {
  const void *grad, *x; // [rows][columns] dtype
  const uint8_t *signs, *mask, *codes;
  Parameter shift, scale;
  int64_t rows, columns, groups, inner;
  int dtype, surrogate;
  double p0, p1;
  void *dx;               // [rows][columns] dtype
  float *dscale, *dshift; // [groups]
};

// isa as in cpu.h.
void binarize_cpu(const Binarize &args, int isa);
void binarize_backward_cpu(const BinarizeBackward &args, int isa);

} // namespace fastloss
