// Gradients of functions whose operand was saved as codes: decoded, used and forgotten in one pass.
#pragma once
#include <cstdint>

namespace fastloss {

enum SavedFunction : int { kGelu = 0, kGeluTanh = 1, kSiluFunction = 2, kSoftmax = 3 };

// codes, lows and steps as in quantize_groups.h: of x, for a softmax of its result y.
struct SavedGradient {
  const uint8_t *codes;
  const float *lows, *steps; // [groups]
  const void *grad;          // [n]
  void *out;                 // [n]: grad f'(x), or y (grad - sum of grad y over a row)
  int64_t n, group, columns; // columns: a softmax's
  int bits, function, dtype;
};

// isa as in cpu.h.
void saved_gradient_cpu(const SavedGradient &args, int isa);

} // namespace fastloss
