// The launchers of lossless codecs on CUDA; docs/design.md, "The lossless contract". No torch, no CUDA header.
// All run on `stream` of `device`, without a synchronisation or an allocation. Blobs lie at multiples of 16 bytes and
// have a plan that contract.check_plan has passed; what their sections hold is not trusted.
#pragma once
#include "cuda.h"
#include "lossless.h"

namespace fastloss {

// Numbers first..first+count of the sequence, in row-major order: layout tiles wants whole bands of 16 rows.
struct CudaLosslessDecode {
  Compressed blob;
  int64_t first, count;
  void *out; // aligned as its numbers are
};

// Rows of the matrix [rows, columns]; the row of an id that is out of range is zeros. Layout rows.
struct CudaLosslessRows {
  Compressed blob;
  const void *index; // [count]
  bool wide;         // int64, else int32
  int64_t count;
  void *out; // [count, columns]
};

void p7_decode_launch(const CudaLosslessDecode &, void *stream);
void p7_decode_cuda(const CudaLosslessDecode &, int device, void *stream);
void p7_rows_launch(const CudaLosslessRows &, void *stream);
void p7_rows_cuda(const CudaLosslessRows &, int device, void *stream);
void r8_decode_launch(const CudaLosslessDecode &, void *stream);
void r8_decode_cuda(const CudaLosslessDecode &, int device, void *stream);
void r8_rows_launch(const CudaLosslessRows &, void *stream);
void r8_rows_cuda(const CudaLosslessRows &, int device, void *stream);

// out[b] = crc32c of bytes b block..(b + 1) block, the last block perhaps short.
constexpr int64_t kCrcPiece = 32768; // bytes that a warp reads
struct CudaCrc32c {
  const uint8_t *data;
  int64_t size, block;
  uint32_t *pieces; // scratch, crc32c_pieces(size, block)
  int64_t *out;
};

int64_t crc32c_pieces(int64_t size, int64_t block);
void crc32c_launch(const CudaCrc32c &, void *stream);
void crc32c_cuda(const CudaCrc32c &, int device, void *stream);

} // namespace fastloss
