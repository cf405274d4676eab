// DFloat11 (format 0.5) on the CPU: python/fastloss/lossless/reference_dfloat11.py says what each part holds.
#pragma once
#include <cstdint>

namespace fastloss {

struct Dfloat11 {
  const uint8_t *luts; // [tables + 1][256]
  int tables;
  const uint8_t *codes;
  int64_t code_bytes;
  const uint8_t *sign_mantissa; // [numel]
  const uint32_t *positions;    // [blocks + 1], rising from 0 to numel; whoever calls has looked
  const uint8_t *gaps;          // 5 bits for each of blocks * threads_per_block threads
  int64_t numel, blocks;
  int bytes_per_thread, threads_per_block;
  uint16_t *out; // [numel]
};

// The numbers; the first block whose codes do not end where the next one's begin (the last: in the last byte), or -1.
int64_t dfloat11_decode_cpu(const Dfloat11 &args);

} // namespace fastloss
