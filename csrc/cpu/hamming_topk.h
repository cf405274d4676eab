// The rows of a database of bits with the largest products, on the CPU: docs/design.md, "The bit contract".
#pragma once
#include "../bits.h"

namespace fastloss {

struct HammingTopk {
  Planes queries, database;
  const float *scale; // [N] of the database, or null
  int64_t count;      // at most N
  void *values;       // [M][count] fp32 with a scale, else int32
  int64_t *index;     // [M][count]
};

// isa as in cpu.h, engine as in bit_products.h.
void hamming_topk_cpu(const HammingTopk &args, int isa, int engine);

} // namespace fastloss
