// Fake quantisation and its gradient on the CPU (docs/design.md, "fake_quant").
#pragma once
#include <cstdint>

namespace fastloss {

// The parameter of flat element i is that of group (i / inner) % groups; n is a multiple of groups * inner.
struct FakeQuant {
  const void *grad; // null: the forward
  const void *x;
  const float *scale, *offset, *zero_point; // [groups]; null: no offset, no zero point
  void *out;                                // y, or dx, or null where dx is not asked for
  float *dscale, *doffset;                  // [groups], or null
  int64_t n, groups, inner;
  float low, high, steps, shift;
  bool rounded; // the range is tested after rounding
  int dtype;
};

// isa as in cpu.h.
void fake_quant_cpu(const FakeQuant &args, int isa);

} // namespace fastloss
