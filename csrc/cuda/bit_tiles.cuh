// Tiles of sums of products of bits: a block computes BM x BN of them, a warp WM x WN, along K in steps of 512 bits
// that cp.async brings ahead of time.
//
// Of several planes every pair is a product by itself, and they are added up by Horner's rule: between two pairs the
// sums are multiplied by the ratio of their weights, so that one set of registers does. Counting is modulo 2^32, where
// odd weights have inverses; the whole sum fits 32 bits, so it is exact whatever the weights.
//
// Shared memory: a row of a step is 64 bytes in four chunks of 16. ldmatrix reads a chunk of 8 rows at a time, and
// chunks are exchanged (`chunk ^ row / 2 % 4`) so that these 8 lie in different banks. The sums leave the registers by
// way of shared memory, where an epilogue finds whole rows: a loop over them is small code and writes whole lines.
#pragma once
#include "bit_products.h"
#include "common.cuh"

#include <algorithm>

namespace fastloss {

constexpr int kStepBytes = 64; // of a row; kRowBytes is a multiple

// The products of planes in the order of Horner's rule.
struct PlanePairs {
  struct Pair {
    int a, b;
    unsigned factor; // of the sums before this pair is added
  } pair[kMostPlanes * kMostPlanes];
  int count;
  unsigned last; // factor after the last pair
};

inline PlanePairs plane_pairs(const Planes &a, const Planes &b) {
  PlanePairs pairs{};
  unsigned weight[kMostPlanes * kMostPlanes];
  for (int zeros = 31; zeros >= 0; --zeros) // the most even weights first: a ratio is a whole number times an odd one
    for (int s = 0; s < a.count; ++s)
      for (int t = 0; t < b.count; ++t) {
        const unsigned w = unsigned(a.weights[s]) * unsigned(b.weights[t]);
        if (w == 0 || (w & -w) != 1u << zeros) continue;
        unsigned factor = 1;
        if (pairs.count > 0) {
          const unsigned before = weight[pairs.count - 1], odd = w >> zeros;
          unsigned inverse = odd; // right to 3 bits; every step of Newton's doubles them
          for (int i = 0; i < 4; ++i) inverse *= 2 - odd * inverse;
          factor = (before >> zeros) * inverse;
        }
        weight[pairs.count] = w;
        pairs.pair[pairs.count++] = {s, t, factor};
      }
  pairs.last = pairs.count ? weight[pairs.count - 1] : 0;
  return pairs;
}

// Both operands as a kernel reads them.
struct BitOperands {
  const uint8_t *a, *b;
  int64_t m, n, row_bytes;
  PlanePairs pairs;
};

inline BitOperands bit_operands(const Planes &a, const Planes &b) {
  BitOperands p{a.bits, b.bits, a.rows, b.rows, row_bytes(a.columns), plane_pairs(a, b)};
  if (a.columns == 0) p.pairs.count = 0;
  return p;
}

// What a row's popcounts add to its sums: sum over p of weights_p popcounts_p, modulo 2^32.
struct PlaneSums {
  const int32_t *popcounts;
  int64_t rows;
  int count;
  unsigned weight[kMostPlanes];

  __device__ unsigned operator()(int64_t row) const {
    unsigned sum = 0;
    for (int p = 0; p < count; ++p) sum += weight[p] * unsigned(__ldg(popcounts + p * rows + row));
    return sum;
  }
};

// The sums of a's rows, say, are multiplied by the offset of b, which is what the whole sum needs of them.
inline PlaneSums plane_sums(const Planes &p, int other_offset) {
  PlaneSums sums{p.popcounts, p.rows, other_offset == 0 ? 0 : p.count, {}};
  for (int i = 0; i < p.count; ++i) sums.weight[i] = unsigned(p.weights[i]) * unsigned(other_offset);
  return sums;
}

template <bool INT8_, int BM_, int BN_, int WM_, int WN_, int STAGES_> struct BitTile {
  static constexpr bool INT8 = INT8_;
  static constexpr int BM = BM_, BN = BN_, WM = WM_, WN = WN_, STAGES = STAGES_;
  static constexpr int kThreads = BM / WM * (BN / WN) * 32;
  static constexpr int kBlocks = kThreads > 128 ? 1 : 2; // on a multiprocessor: a thread has up to 255 registers
  static constexpr int kRows = kThreads / 4;             // a thread copies 16 bytes of every kRows-th row
  static constexpr int MT = WM / 16, NT = WN / 8;
  static constexpr int kStage = (BM + BN) * kStepBytes;
  static constexpr int kShared = STAGES * kStage;
  static_assert(BM % kRows == 0 && BN % kRows == 0 && kRows % 8 == 0, "chunks are exchanged alike in every 8 rows");
  using Sums = int[MT][NT][4];
};

// The steps of one block: of all pairs of planes, and tile after tile along the rows of b.
template <class Tile> class BitStream {
  static constexpr int BM = Tile::BM, MT = Tile::MT, NT = Tile::NT;

public:
  // Tiles at m0 and at n0, n0 + BN, ... below n_end.
  __device__ BitStream(const BitOperands &p, uint4 *shared, int64_t m0, int64_t n0, int64_t n_end)
      : p_(p), shared_(shared_address(shared)), n0_(n0), n_end_(p.pairs.count ? n_end : n0), m0_(m0) {
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    copy_ = swizzled(tid / 4, tid % 4);
    const int wm = warp % (BM / Tile::WM) * Tile::WM, wn = warp / (BM / Tile::WM) * Tile::WN;
    read_a_ = swizzled(wm + lane % 16, lane / 16);
    read_b_ = BM * kStepBytes + swizzled(wn + lane / 16 * 8 + lane % 8, lane / 8 % 2);
    point();
#pragma unroll
    for (int s = 0; s < Tile::STAGES - 1; ++s) copy();
  }

  // The sums of the next tile, before PlanePairs::last.
  __device__ void tile(typename Tile::Sums &sums) {
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
      for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][j][e] = 0;
    for (int pair = 0; pair < p_.pairs.count; ++pair) {
      if (pair > 0) {
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
          for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[i][j][e] = int(unsigned(sums[i][j][e]) * p_.pairs.pair[pair].factor);
      }
#pragma unroll 1
      for (int64_t k = 0; k < p_.row_bytes; k += kStepBytes) step(sums);
    }
  }

private:
  const BitOperands &p_;
  const SharedAddress shared_;
  int64_t n0_, n_end_;
  const int64_t m0_;
  int64_t k_ = 0;
  int pair_ = 0, full_ = 0, free_ = 0; // the stages to be multiplied and to be filled, as bytes
  int copy_, read_a_, read_b_;         // where in a stage
  const uint8_t *from_a_, *from_b_;

  __device__ static int swizzled(int row, int chunk) { return row * kStepBytes + (chunk ^ (row / 2 % 4)) * 16; }

  // At the first step of a pair of planes.
  __device__ void point() {
    const int row = threadIdx.x / 4, chunk = threadIdx.x % 4;
    const auto &pair = p_.pairs.pair[pair_];
    from_a_ = p_.a + (pair.a * p_.m + m0_ + row) * p_.row_bytes + chunk * 16;
    from_b_ = p_.b + (pair.b * p_.n + n0_ + row) * p_.row_bytes + chunk * 16;
  }

  // Starts the copies of the next step that there is; rows outside become zeros.
  __device__ void copy() {
    if (n0_ < n_end_) {
      const int row = threadIdx.x / 4;
      const int64_t next = Tile::kRows * p_.row_bytes, left_a = p_.m - m0_ - row, left_b = n_end_ - n0_ - row;
      const uint8_t *a = from_a_, *b = from_b_;
#pragma unroll
      for (int i = 0; i < BM / Tile::kRows; ++i, a += next)
        cp_async16(shared_ + free_ + copy_ + i * Tile::kRows * kStepBytes, a, i * Tile::kRows < left_a ? 16 : 0);
#pragma unroll
      for (int i = 0; i < Tile::BN / Tile::kRows; ++i, b += next)
        cp_async16(shared_ + free_ + copy_ + (BM + i * Tile::kRows) * kStepBytes, b, i * Tile::kRows < left_b ? 16 : 0);
      from_a_ += kStepBytes, from_b_ += kStepBytes, k_ += kStepBytes;
      if (k_ == p_.row_bytes) {
        k_ = 0;
        if (++pair_ == p_.pairs.count) pair_ = 0, n0_ += Tile::BN;
        point();
      }
    }
    cp_async_commit();
    free_ = free_ + Tile::kStage == Tile::kShared ? 0 : free_ + Tile::kStage;
  }

  __device__ void step(typename Tile::Sums &sums) {
    cp_async_wait<Tile::STAGES - 2>();
    __syncthreads(); // this step is there for all threads, and all have done with the stage before it
    copy();
    constexpr int kUnroll = Tile::INT8 ? 1 : 2;
#pragma unroll kUnroll
    for (int half = 0; half < 2; ++half) { // 256 bits
      unsigned a[MT][4], b[NT][2];
#pragma unroll
      for (int i = 0; i < MT; ++i) ldmatrix_x4(a[i], shared_ + full_ + (read_a_ ^ half * 32) + i * 16 * kStepBytes);
#pragma unroll
      for (int j = 0; j < NT; j += 2) {
        unsigned two[4];
        ldmatrix_x4(two, shared_ + full_ + (read_b_ ^ half * 32) + j * 8 * kStepBytes);
        b[j][0] = two[0], b[j][1] = two[1], b[j + 1][0] = two[2], b[j + 1][1] = two[3];
      }
      if constexpr (Tile::INT8) multiply_bytes(sums, a, b);
      else {
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
          for (int j = 0; j < NT; ++j) mma_m16n8k256_b1_and(sums[i][j], a[i], b[j]);
      }
    }
    full_ = full_ + Tile::kStage == Tile::kShared ? 0 : full_ + Tile::kStage;
  }

  // The same from words of bits on the tensor cores for int8: bits i, i + 8, i + 16 and i + 24 of a word are four
  // bytes. The order of columns does not matter as long as a and b agree.
  __device__ static void multiply_bytes(typename Tile::Sums &sums, const unsigned (&a)[MT][4],
                                        const unsigned (&b)[NT][2]) {
    constexpr unsigned kOnes = 0x01010101;
#pragma unroll
    for (int word = 0; word < 2; ++word)
#pragma unroll
      for (int bit = 0; bit < 8; bit += 2) {
        unsigned x[MT][4], y[NT][2];
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
          for (int h = 0; h < 4; ++h) x[i][h] = a[i][word * 2 + h % 2] >> (bit + h / 2) & kOnes;
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
          for (int h = 0; h < 2; ++h) y[j][h] = b[j][word] >> (bit + h) & kOnes;
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
          for (int j = 0; j < NT; ++j) mma_m16n8k32_s8(sums[i][j], x[i], y[j]);
      }
  }
};

// The sums of a tile in shared memory, [BM][BN] with groups of 8 columns exchanged: neither the stores of a warp's
// fragments nor reading a row in order meets a bank twice.
template <class Tile> struct TileSums {
  static constexpr int kBytes = Tile::BM * Tile::BN * 4;
  int *shared;

  __device__ int *at(int row, int column) const { return shared + row * Tile::BN + (column ^ row % 4 * 8); }

  // Who reads rows of other warps puts barriers around this.
  __device__ void put(const typename Tile::Sums &sums, unsigned factor) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = warp % (Tile::BM / Tile::WM) * Tile::WM + lane / 4;
    const int column = warp / (Tile::BM / Tile::WM) * Tile::WN + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < Tile::MT; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int j = 0; j < Tile::NT; ++j)
          *reinterpret_cast<int2 *>(at(row + i * 16 + h * 8, column + j * 8)) =
              make_int2(int(unsigned(sums[i][j][2 * h]) * factor), int(unsigned(sums[i][j][2 * h + 1]) * factor));
  }
};

} // namespace fastloss
