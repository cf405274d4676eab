// Products of rows of bits with an epilogue, on the CPU: docs/design.md, "The bit contract".
#pragma once
#include "../bits.h"
#include "bit_products.h"

namespace fastloss {

enum BgemmOutput : int { kBgemmInt32 = 3, kBgemmSigns = 4 }; // below: DType

struct Bgemm {
  Planes a, b;
  const float *row_scale, *column_scale, *bias; // [M], [N], [N], or null
  int activation;
  int output;         // kFloat32, kFloat16, kBFloat16 (fastloss.h) or a BgemmOutput
  void *y;            // [M][N] of the output's type; signs: [M][row_bytes(N)], zeros
  int32_t *popcounts; // signs: [M]
  bool stream;        // past the cache: y is larger than it
};

// isa as in cpu.h, engine as in bit_products.h.
void bgemm_cpu(const Bgemm &args, int isa, int engine);

} // namespace fastloss
