// crc32c of every `block` bytes (docs/design.md, "The lossless contract"). A checksum is a remainder of polynomials
// over GF(2), and remainders of parts are put together by products with powers of x. A block is cut into pieces of 32
// KB; a warp reads a piece in rows of 128 bytes, lane l the l-th word, and keeps the remainder of its column: one row
// further is a product with x^1024, four look-ups. Columns and pieces are then summed, each times its power. All parts
// are aligned to the end of the block: zeros in front of a message do not change its remainder, so the first part may
// be short. What the initial value 2^32 - 1 of a checksum adds depends on the length alone.
#include "common.cuh"

#include "lossless_codecs.h"

namespace fastloss {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * 32, kRow = 128;
constexpr unsigned kPolynomial = 0x82F63B78; // bit 31 is x^0
constexpr unsigned kOne = 1u << 31, kWholeWarp = ~0u;

// a b mod the polynomial
__host__ __device__ inline unsigned product(unsigned a, unsigned b) {
  unsigned sum = 0;
  for (unsigned bit = kOne; bit; bit >>= 1) {
    sum ^= a & bit ? b : 0;
    b = b >> 1 ^ (b & 1 ? kPolynomial : 0);
  }
  return sum;
}

// x^bits mod the polynomial
unsigned power(int64_t bits) {
  unsigned result = kOne, square = kOne >> 1; // x
  for (; bits; bits >>= 1) {
    if (bits & 1) result = product(result, square);
    square = product(square, square);
  }
  return result;
}

struct Powers {
  unsigned row[32];    // x^1024 times bit i of a remainder
  unsigned column[5];  // x^(32 2^k)
  unsigned piece[6];   // x^(8 kCrcPiece 2^k)
  unsigned word;       // x^32: a checksum is the remainder of the message times it
  unsigned full, last; // what the initial value adds to a whole block, and to the last one
};

// The sum of the lanes' remainders, each but the last times its power; lane 31 has it.
__device__ inline unsigned sum_lanes(unsigned remainder, const unsigned *powers, int lane) {
#pragma unroll
  for (int k = 0; k < 5; ++k) {
    const unsigned left = __shfl_up_sync(kWholeWarp, remainder, 1u << k);
    if (lane >> k & 1 && (lane & ((1 << k) - 1)) == (1 << k) - 1) remainder ^= product(left, powers[k]);
  }
  return remainder;
}

__device__ inline int64_t pieces_of(int64_t block) { return (block + kCrcPiece - 1) / kCrcPiece; }

__global__ void __launch_bounds__(kThreads)
    piece_kernel(const __grid_constant__ CudaCrc32c p, const __grid_constant__ Powers powers) {
  SHARED_ARRAY(unsigned, table, [4][256]); // byte b of a remainder times x^1024
  for (int i = threadIdx.x; i < 4 * 256; i += kThreads) {
    unsigned sum = 0;
#pragma unroll
    for (int bit = 0; bit < 8; ++bit)
      if (i >> bit & 1) sum ^= powers.row[i / 256 * 8 + bit];
    table[i / 256][i % 256] = sum;
  }
  __syncthreads(); // table
  const int lane = threadIdx.x % 32;
  const int64_t job = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t pieces = pieces_of(p.block), block = job / pieces, piece = job % pieces;
  if (block * p.block >= p.size) return;
  const int64_t begin = block * p.block, end = min(p.size, begin + p.block);
  const int64_t stop = end - (pieces - 1 - piece) * kCrcPiece, start = max(begin, stop - kCrcPiece);
  unsigned remainder = 0;
  // `at` may be before start in the first row only.
  const bool words = (reinterpret_cast<uintptr_t>(p.data) + uintptr_t(stop)) % 4 == 0;
  const int64_t rows = stop > start ? (stop - start + kRow - 1) / kRow : 0;
#pragma unroll 4
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = stop - (rows - row) * kRow + lane * 4;
    unsigned word = 0;
    if (words && at >= start) word = __ldcs(reinterpret_cast<const unsigned *>(p.data + at));
    else
      for (int k = 0; k < 4; ++k)
        if (at + k >= start) word |= unsigned(p.data[at + k]) << 8 * k;
    remainder = table[0][remainder & 255] ^ table[1][remainder >> 8 & 255] ^ table[2][remainder >> 16 & 255] ^
                table[3][remainder >> 24] ^ word;
  }
  remainder = sum_lanes(remainder, powers.column, lane);
  if (lane == 31) p.pieces[job] = remainder;
}

// A warp puts the pieces of a block together: lane l those that are 31 - l behind a multiple of 32 from the end.
__global__ void __launch_bounds__(kThreads)
    block_kernel(const __grid_constant__ CudaCrc32c p, const __grid_constant__ Powers powers) {
  const int lane = threadIdx.x % 32;
  const int64_t block = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, pieces = pieces_of(p.block);
  if (block * p.block >= p.size) return;
  const int64_t rounds = (pieces + 31) / 32;
  unsigned remainder = 0;
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t piece = pieces - (rounds - round) * 32 + lane;
    remainder = (round ? product(remainder, powers.piece[5]) : 0) ^ (piece >= 0 ? p.pieces[block * pieces + piece] : 0);
  }
  remainder = sum_lanes(remainder, powers.piece, lane);
  if (lane == 31) {
    const unsigned initial = (block + 1) * p.block <= p.size ? powers.full : powers.last;
    p.out[block] = int64_t(uint32_t(~(product(remainder, powers.word) ^ initial)));
  }
}

} // namespace

int64_t crc32c_pieces(int64_t size, int64_t block) {
  return (size + block - 1) / block * ((block + kCrcPiece - 1) / kCrcPiece);
}

void crc32c_launch(const CudaCrc32c &p, void *stream) {
  if (p.size == 0) return;
  Powers powers;
  const unsigned row = power(8 * kRow);
  for (int bit = 0; bit < 32; ++bit) powers.row[bit] = product(1u << bit, row);
  for (int k = 0; k < 5; ++k) powers.column[k] = power(int64_t(32) << k);
  for (int k = 0; k < 6; ++k) powers.piece[k] = power((8 * kCrcPiece) << k);
  powers.word = power(32);
  powers.full = product(~0u, power(8 * p.block));
  powers.last = product(~0u, power(8 * ((p.size - 1) % p.block + 1)));
  const int64_t jobs = crc32c_pieces(p.size, p.block), blocks = (p.size + p.block - 1) / p.block;
  if (jobs > INT32_MAX) throw std::runtime_error("crc32c on CUDA takes at most 2^31 - 1 pieces");
  Launch l;
  l.grid = dim3(unsigned((jobs + kWarps - 1) / kWarps));
  l.block = dim3(kThreads);
  l.stream = static_cast<decltype(l.stream)>(stream);
  launch(l, piece_kernel, p, powers);
  l.grid = dim3(unsigned((blocks + kWarps - 1) / kWarps));
  launch(l, block_kernel, p, powers);
}

void crc32c_cuda(const CudaCrc32c &p, int device, void *stream) {
  const DeviceGuard guard(device);
  crc32c_launch(p, stream);
}

} // namespace fastloss
