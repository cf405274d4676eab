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

} // namespace fastloss
