// Numbers to planes of bits and back, on the CPU: docs/design.md, "The bit contract".
#pragma once
#include "../bits.h"

namespace fastloss {

// center and scale: [parameter_rows][groups of `group` columns], a null is 0 and 1; parameter_rows is 1 or rows.
struct PackBits {
  const void *x; // [rows][columns] dtype
  const float *center, *scale;
  int64_t center_rows, scale_rows;
  int64_t rows, columns, group; // group 0: all columns
  int dtype, kind, low, planes;
  uint8_t *bits;      // [planes][rows][row_bytes(columns)]
  int32_t *popcounts; // [planes][rows], zeros
};

struct UnpackBits {
  Planes planes;
  const float *scale; // as above
  int64_t scale_rows, group;
  int dtype;
  void *x; // [rows][columns] dtype
};

// isa as in cpu.h.
void pack_bits_cpu(const PackBits &args, int isa);
void unpack_bits_cpu(const UnpackBits &args, int isa);

} // namespace fastloss
