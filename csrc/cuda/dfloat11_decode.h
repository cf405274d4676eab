// The launcher of dfloat11_decode on CUDA. No torch, no CUDA header.
#pragma once
#include "cuda.h"

namespace fastloss {

// A tensor as DFloat11 (arXiv 2504.11651) stores it: Huffman codes of the exponents, first bit first, at most 32 bits
// each; sign and mantissa as they are. Nothing in it is trusted.
struct CudaDfloat11 {
  // [tables + 1, 256]. Table 0 has the symbol of a byte, or 256 - t where table t, of the next byte, goes on (t < 17
  // and t < tables); behind the tables are the lengths of the symbols' codes.
  const uint8_t *luts;
  int64_t tables;       // 1 to 16
  const uint8_t *codes; // aligned to 4 bytes
  int64_t code_bytes;
  const uint8_t *sign_mantissa;     // [numel], aligned to 8
  const uint32_t *output_positions; // [blocks + 1]: the number that the first code of a block of threads is of
  const uint8_t *gaps;              // 5 bits a thread of 8 bytes, first bit first: where the first code begins in them
  int64_t gap_bytes;
  void *out; // bf16 [numel], aligned to 16; every number is written
  int64_t numel;
  int threads; // in a block, a multiple of 32 up to 1024
};

void dfloat11_decode_launch(const CudaDfloat11 &, int multiprocessors, void *stream);
void dfloat11_decode_cuda(const CudaDfloat11 &, int device, void *stream);

} // namespace fastloss
