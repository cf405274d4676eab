// How a warp reads units of 16 x 128 numbers of a P7 matrix as A fragments of mma.m16n8k16, in either layout.
//
// A stage in shared memory holds a unit for each warp, 2048 bytes of the plane and 896 of codes as cp.async brings
// them, and 128 columns of x. Layout tiles has the numbers of a lane one behind the other. Of layout rows a lane takes
// 32 consecutive numbers of two rows: in which order a product runs through its columns is free, as long as x goes
// along.
//
// Bank conflicts, counted in wavefronts of 128 bytes for a warp and unit: the plane 16 to write and 16 to read (chunks
// of 16 bytes are exchanged by row), codes 7 and 7 (tiles: a stride of 7 words is odd; rows: 16, as lanes 2 and 3 of a
// row meet others), x 16 for every eight of its rows, the table 32 (a copy of its 128 entries in every bank).
#pragma once
#include "common.cuh"
#include "lossless_linear.h"

namespace fastloss {

constexpr int kUnitRows = 16, kUnitColumns = 128;
constexpr int kUnitPlane = 2048, kUnitCodes = 896, kUnit = kUnitPlane + kUnitCodes;
constexpr int kTableBytes = 128 * 32 * 4;
constexpr int kInputTile = 8 * kUnitColumns * 2; // eight rows of x

// What the kernel reads, by value.
struct LinearOperands {
  const uint8_t *table, *codes, *plane;
  const uint64_t *escape_offsets;
  const uint16_t *escape_positions;
  const unsigned *escape_values; // two numbers each
  int64_t escapes, numel, rows;
  const __nv_bfloat16 *x, *bias;
  __nv_bfloat16 *out;
  float *parts;
  int n, units, splits; // units: columns / 128
  __host__ __device__ int64_t columns() const { return int64_t(units) * kUnitColumns; }
};

// Both fields of every code where they stand in a pair of bf16, 32 copies.
__device__ inline void fill_table(const uint8_t *table, char *shared, int thread, int threads) {
  for (int chunk = thread; chunk < kTableBytes / 16; chunk += threads) { // 8 to an entry
    const unsigned pair = unsigned(__ldg(table + chunk / 8)) << 7 | unsigned(__ldg(table + 128 + chunk / 8)) << 23;
    reinterpret_cast<uint4 *>(shared)[chunk] = make_uint4(pair, pair, pair, pair);
  }
}

// The address in this lane's copy of the table of code `pair` of a string of codes of 7 bits. All but the words is
// known when it is compiled: a shift, and a merge.
__device__ __forceinline__ unsigned code_address(const unsigned *words, int pair, unsigned lane_offset) {
  const int word = 7 * pair / 32, bit = 7 * pair % 32;
  unsigned v;
  if (bit <= 7) v = words[word] << (7 - bit);
  else if (bit <= 25) v = words[word] >> (bit - 7);
  else v = __funnelshift_r(words[word], words[word + 1], bit - 7);
  return (v & 0x3f80u) | lane_offset;
}

// Pair `pair` as two bf16: the fields by their code, sign and mantissa from the plane.
__device__ __forceinline__ unsigned decode_pair(const char *table, const unsigned *codes, const unsigned *plane,
                                                int pair, unsigned lane_offset) {
  const unsigned fields = *reinterpret_cast<const unsigned *>(table + code_address(codes, pair, lane_offset));
  return (__byte_perm(plane[pair / 2], 0, pair % 2 ? 0x3322 : 0x1100) & 0x807f807fu) | fields;
}

__device__ inline void load4(unsigned *to, const char *shared) {
  const uint4 v = *reinterpret_cast<const uint4 *>(shared);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

template <int LAYOUT> class Units;

template <> class Units<kLayoutTiles> {
public:
  __device__ Units(const LinearOperands &p, int64_t band, int first, int lane)
      : codes_(p.codes + (band * p.units + first) * kUnitCodes + lane * 16),
        plane_(p.plane + (band * p.units + first) * kUnitPlane + lane * 16), lane_(lane) {}

  // cp.async of the next unit, by a warp.
  __device__ void stage(SharedAddress to) {
    const int chunk = (lane_ ^ (lane_ >> 3 & 3)) * 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) cp_async16(to + chunk + 512 * i, plane_ + 512 * i);
    cp_async16(to + kUnitPlane + lane_ * 16, codes_);
    if (lane_ < 24) cp_async16(to + kUnitPlane + 512 + lane_ * 16, codes_ + 512);
    plane_ += kUnitPlane, codes_ += kUnitCodes;
  }

  // The bytes of this lane.
  __device__ void load(const char *unit) {
    const char *const plane = unit + lane_ * 64;
#pragma unroll
    for (int q = 0; q < 4; ++q) load4(plane_words_ + 4 * q, plane + (q ^ (lane_ >> 1 & 3)) * 16);
    const unsigned *const codes = reinterpret_cast<const unsigned *>(unit + kUnitPlane + lane_ * 28);
#pragma unroll
    for (int i = 0; i < 7; ++i) code_words_[i] = codes[i];
  }

  // Step 0..7 of the unit: register r is the lane's pair 4 step + r.
  __device__ __forceinline__ void fragment(unsigned (&a)[4], int step, const char *table) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = decode_pair(table, code_words_, plane_words_, 4 * step + r, lane_ * 4);
  }

  // Where 16 bytes of x go: ldmatrix reads one chunk of eight rows at a time.
  static __device__ int input_chunk(int row, int chunk) { return row * 16 + (chunk ^ (row & 7)); }
  // B fragments of steps 2 s and 2 s + 1.
  __device__ void inputs(unsigned (&b)[4], char *tile, int s) const {
    const int row = lane_ & 7;
    ldmatrix_x4(b, shared_address(tile + row * 256 + ((4 * s + (lane_ >> 3)) ^ row) * 16));
  }

private:
  const uint8_t *codes_, *plane_;
  int lane_;
  unsigned plane_words_[16], code_words_[7];
};

template <> class Units<kLayoutRows> {
public:
  __device__ Units(const LinearOperands &p, int64_t band, int first, int lane)
      : codes_(p.codes + (band * kUnitRows * p.units + first) * 56),
        plane_(p.plane + (band * kUnitRows * p.units + first) * kUnitColumns), lane_(lane) {
    const int last = int(min(p.rows - band * kUnitRows, int64_t(kUnitRows)) - 1); // rows beyond are copies of it
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int in_codes = 32 * i + lane;
      from_codes_[i] = unsigned(min(in_codes / 7, last) * p.units * 56 + in_codes % 7 * 8);
      from_plane_[i] = unsigned(min(4 * i + lane / 8, last) * p.units * kUnitColumns + lane % 8 * 16);
    }
  }

  __device__ void stage(SharedAddress to) {
    const int chunk = (lane_ ^ (lane_ >> 3 & 1)) * 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) cp_async16(to + chunk + 512 * i, plane_ + from_plane_[i]);
#pragma unroll
    for (int i = 0; i < 4; ++i) // 56 bytes of a row: aligned to 8
      if (i < 3 || lane_ < 16) cp_async8(to + kUnitPlane + 256 * i + lane_ * 8, codes_ + from_codes_[i]);
    plane_ += kUnitColumns, codes_ += 56;
  }

  // Of rows g and g + 8 the numbers 32 t to 32 t + 31; their codes begin in the middle of a word where t is odd.
  __device__ void load(const char *unit) {
    const int g = lane_ >> 2, t = lane_ & 3;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const char *const plane = unit + (g + 8 * half) * 128;
      load4(plane_words_[half], plane + (2 * t ^ (g & 1)) * 16);
      load4(plane_words_[half] + 4, plane + ((2 * t + 1) ^ (g & 1)) * 16);
      const unsigned *const codes =
          reinterpret_cast<const unsigned *>(unit + kUnitPlane + (g + 8 * half) * 56) + 7 * t / 2;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        code_words_[half][i] = __funnelshift_r(codes[i], i < 3 ? codes[i + 1] : 0, 16 * (t & 1));
    }
  }

  __device__ __forceinline__ void fragment(unsigned (&a)[4], int step, const char *table) const {
#pragma unroll
    for (int r = 0; r < 4; ++r)
      a[r] = decode_pair(table, code_words_[r & 1], plane_words_[r & 1], 2 * step + (r >> 1), lane_ * 4);
  }

  // A lane reads 64 consecutive bytes of a row.
  static __device__ int input_chunk(int row, int chunk) { return row * 16 + (chunk ^ (chunk >> 3) ^ (row & 1) * 2); }
  __device__ void inputs(unsigned (&b)[4], char *tile, int s) const {
    const int row = lane_ >> 2, chunk = 4 * (lane_ & 3) + s;
    load4(b, tile + input_chunk(row, chunk) * 16);
  }

private:
  const uint8_t *codes_, *plane_;
  unsigned from_codes_[4], from_plane_[4];
  int lane_;
  unsigned plane_words_[2][8], code_words_[2][4];
};

// Row within its band and column of number `at` of a band, in the order of the layout.
struct Place {
  int row, column;
};
template <int LAYOUT> __device__ Place place_of(unsigned at, int units) {
  if constexpr (LAYOUT == kLayoutTiles) {
    const int g = at >> 8 & 7, t = at >> 6 & 3, i = at >> 3 & 7, r = at >> 1 & 3;
    return {g + 8 * (r & 1), int(at >> 11) * kUnitColumns + 16 * i + 2 * t + 8 * (r >> 1) + int(at & 1)};
  } else {
    const unsigned columns = unsigned(units) * kUnitColumns;
    return {int(at / columns), int(at % columns)};
  }
}

} // namespace fastloss
