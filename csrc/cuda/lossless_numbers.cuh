// Numbers of a blob, eight at a time: their fields and planes put together, and their place in the tensor. Eight
// numbers are 28 bits of codes, one uint2 of every byte plane and one byte of every bit plane.
#pragma once
#include "common.cuh"

#include "lossless_codecs.h"

namespace fastloss {

constexpr int kEights = int(kLosslessBlock / 8); // of a block
constexpr int kUnit = 16 * 128;                  // numbers of a unit of layout tiles
constexpr unsigned kWholeWarp = ~0u;

template <int NUMBER> struct Parts {
  static constexpr int kBytes = kSplits[NUMBER].bytes, kPlanes = kSplits[NUMBER].byte_planes,
                       kBits = kSplits[NUMBER].bit_planes;
  static constexpr int kWords = 2 * kBytes; // of eight numbers
  using Integer = std::conditional_t<kBytes == 1, uint8_t, std::conditional_t<kBytes == 2, uint16_t, uint32_t>>;
};

// What eight numbers have beside their fields.
template <int NUMBER> struct Rest {
  uint2 bytes[Parts<NUMBER>::kPlanes + (Parts<NUMBER>::kPlanes == 0)];
  unsigned bits[Parts<NUMBER>::kBits + (Parts<NUMBER>::kBits == 0)];
};

// How many numbers of a block are stored, the zeros that fill its last group included.
__device__ inline int block_numbers(const Compressed &c, int64_t block) {
  const int64_t padded = (c.numel + kLosslessGroup - 1) / kLosslessGroup * kLosslessGroup;
  return int(min(kLosslessBlock, padded - block * kLosslessBlock));
}

// Of the byte planes those that are stored raw, and all bit planes.
template <int NUMBER> __device__ inline Rest<NUMBER> load_rest(const Compressed &c, int64_t block, int eight) {
  using P = Parts<NUMBER>;
  Rest<NUMBER> rest;
#pragma unroll
  for (int p = 0; p < P::kPlanes; ++p) {
    rest.bytes[p] = make_uint2(0, 0);
    if (c.bytes[p])
      rest.bytes[p] = __ldcs(reinterpret_cast<const uint2 *>(c.bytes[p] + block * kLosslessBlock) + eight);
  }
  if (P::kBits) {
    const uint8_t *const bits = c.bits + block * (P::kBits * kEights);
    const int pitch = block_numbers(c, block) / 8;
#pragma unroll
    for (int p = 0; p < P::kBits; ++p) rest.bits[p] = __ldcs(bits + p * pitch + eight);
  }
  return rest;
}

// Puts planes beside the fields, which are in place.
template <int NUMBER>
__device__ inline void merge_rest(unsigned (&word)[Parts<NUMBER>::kWords], const Rest<NUMBER> &rest) {
  if constexpr (NUMBER == kBf16) {
#pragma unroll
    for (int q = 0; q < 4; ++q) // a byte twice: its sign from the upper one, its mantissa from the lower
      word[q] |= __byte_perm(q < 2 ? rest.bytes[0].x : rest.bytes[0].y, 0, q % 2 ? 0x3322 : 0x1100) & 0x807f807f;
  } else if constexpr (NUMBER == kFp16) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      word[q] |= __byte_perm(q < 2 ? rest.bytes[0].x : rest.bytes[0].y, 0, q % 2 ? 0x4342 : 0x4140);
#pragma unroll
      for (int p = 0; p < 3; ++p) // two bits, 16 apart
        word[q] |= ((rest.bits[p] >> 2 * q & 3) * 0x8001 & 0x10001) << (p < 2 ? 8 + p : 15);
    }
  } else if constexpr (NUMBER == kFp32) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const unsigned b0 = k < 4 ? rest.bytes[0].x : rest.bytes[0].y, b1 = k < 4 ? rest.bytes[1].x : rest.bytes[1].y,
                     b2 = k < 4 ? rest.bytes[2].x : rest.bytes[2].y, at = k % 4;
      const unsigned low = __byte_perm(b0, b1, (4 + at) << 4 | at);
      word[k] |= __byte_perm(low, b2, (4 + at) << 12 | (4 + at) << 8 | 0x10) & 0x807fffff;
    }
  } else {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int p = 0; p < Parts<NUMBER>::kBits; ++p) { // four bits, 8 apart
        const unsigned spread = (rest.bits[p] >> 4 * h & 15) * 0x204081 & 0x01010101;
        word[h] |= spread << (p == Parts<NUMBER>::kBits - 1 ? 7 : p);
      }
  }
}

// The k-th of eight numbers; k is known when this is compiled.
template <int NUMBER>
__device__ inline typename Parts<NUMBER>::Integer number_at(const unsigned (&word)[Parts<NUMBER>::kWords], int k) {
  constexpr int kEach = 4 / Parts<NUMBER>::kBytes;
  return typename Parts<NUMBER>::Integer(word[k / kEach] >> k % kEach * 8 * Parts<NUMBER>::kBytes);
}

template <int NUMBER> __device__ inline void store_eight(void *to, const unsigned (&word)[Parts<NUMBER>::kWords]) {
  if constexpr (Parts<NUMBER>::kWords == 2) {
    *static_cast<uint2 *>(to) = make_uint2(word[0], word[1]);
  } else {
#pragma unroll
    for (int w = 0; w < Parts<NUMBER>::kWords; w += 4)
      static_cast<uint4 *>(to)[w / 4] = make_uint4(word[w], word[w + 1], word[w + 2], word[w + 3]);
  }
}

// Numbers low..high of a block, or of another part of the sequence: where they go, and whether eight that begin at a
// multiple of eight can be stored at once.
template <int NUMBER> struct Window {
  char *out; // of number 0, which need not be there
  int low, high;
  bool whole;

  __device__ Window(void *to, int64_t first, int low_, int high_)
      : out(static_cast<char *>(to) - first * Parts<NUMBER>::kBytes), low(low_), high(high_) {
    whole = reinterpret_cast<uintptr_t>(out) % (Parts<NUMBER>::kBytes == 1 ? 8 : 16) == 0;
  }
  __device__ bool touches(int at) const { return at < high && at + 8 > low; } // eight numbers from `at` on
  __device__ void store(int at, const unsigned (&word)[Parts<NUMBER>::kWords]) const {
    char *const to = out + at * Parts<NUMBER>::kBytes;
    if (whole && at >= low && at + 8 <= high) return store_eight<NUMBER>(to, word);
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (at + k >= low && at + k < high)
        reinterpret_cast<typename Parts<NUMBER>::Integer *>(to)[k] = number_at<NUMBER>(word, k);
  }
};

// Where a number of layout tiles stands in the row-major matrix.
__device__ inline int64_t tile_place(int64_t number, int64_t columns) {
  const int64_t unit = number / kUnit, units = columns / 128;
  const int lane = int(number % kUnit) / 64, j = int(number % 64);
  const int64_t row = unit / units * 16 + lane / 4 + 8 * (j >> 1 & 1);
  return row * columns + unit % units * 128 + 16 * (j >> 3) + 8 * (j >> 2 & 1) + 2 * (lane % 4) + (j & 1);
}

} // namespace fastloss
