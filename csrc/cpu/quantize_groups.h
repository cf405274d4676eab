// Groups of a tensor as codes of 8 or 4 bits, and back (docs/design.md, "Groups of saved activations").
#pragma once
#include <cstdint>

namespace fastloss {

struct QuantizeGroups {
  const void *x;
  const float *low, *high; // [channels], or null: each group's minimum and maximum
  const int64_t *seed;     // null: nearest
  uint8_t *codes;          // [groups][group * bits / 8]
  float *lows, *steps;     // [groups]
  int64_t n, group, channels;
  int bits, dtype;
};

struct DequantizeGroups {
  const uint8_t *codes;
  const float *lows, *steps;
  void *x;
  int64_t n, group;
  int bits, dtype;
};

// isa as in cpu.h.
void quantize_groups_cpu(const QuantizeGroups &args, int isa);
void dequantize_groups_cpu(const DequantizeGroups &args, int isa);

} // namespace fastloss
