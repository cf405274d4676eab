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

// Where the encoders write what numbers have beside their fields: byte planes padded to a group, and all bit planes.
struct SplitPlanes {
  uint8_t *bytes[3];
  uint8_t *bits;
};

// The passes of P7's encoder. `numbers` and the planes lie at multiples of 16 bytes.
struct CudaP7Encode {
  const void *numbers;
  int64_t numel;
  int number;                 // kBf16, kFp16, kFp32
  unsigned long long *counts; // p7_histogram: [65536], zeros before
  const uint8_t *table;       // p7_encode: [256]
  uint8_t *codes_of;          // scratch [65536]
  uint8_t *codes;
  SplitPlanes planes;
  int64_t *counts_of_escapes; // [blocks]
  const int64_t *offsets;     // p7_escapes: [blocks + 1], their sums
  uint16_t *positions;
  void *values;
};

void p7_histogram_launch(const CudaP7Encode &, int blocks, void *stream);
void p7_histogram_cuda(const CudaP7Encode &, int device, void *stream);
void p7_encode_launch(const CudaP7Encode &, void *stream);
void p7_encode_cuda(const CudaP7Encode &, int device, void *stream);
void p7_escapes_launch(const CudaP7Encode &, void *stream);
void p7_escapes_cuda(const CudaP7Encode &, int device, void *stream);

// All numbers as fields and planes.
struct CudaByteSplit {
  const void *numbers;
  int64_t numel;
  int number;
  uint8_t *field; // padded to a group
  SplitPlanes planes;
};

void byte_split_launch(const CudaByteSplit &, void *stream);
void byte_split_cuda(const CudaByteSplit &, int device, void *stream);
// counts[256], zeros before; the plane is padded to a group and lies at a multiple of 8 bytes.
void byte_histogram_launch(const uint8_t *plane, int64_t numel, unsigned long long *counts, int blocks, void *stream);
void byte_histogram_cuda(const uint8_t *plane, int64_t numel, unsigned long long *counts, int device, void *stream);

// The passes of R8's encoder.
constexpr int64_t kR8Scratch = 64 + 2 * kLosslessBlock; // of a block: states, literals, stream
struct CudaR8Encode {
  const uint8_t *plane;
  int64_t numel;
  const uint8_t *frequencies; // [256], at a multiple of 8 bytes, their sum at most 255
  uint8_t *scratch;           // [blocks, kR8Scratch]
  int64_t *lengths;           // r8_encode: [blocks]
  int *literals;              // [blocks]
  const int64_t *offsets;     // r8_move: [blocks + 1], sums of the lengths
  uint8_t *data;
};

void r8_encode_launch(const CudaR8Encode &, void *stream);
void r8_encode_cuda(const CudaR8Encode &, int device, void *stream);
void r8_move_launch(const CudaR8Encode &, void *stream);
void r8_move_cuda(const CudaR8Encode &, int device, void *stream);

} // namespace fastloss
