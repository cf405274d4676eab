// Numbers into fields and planes, eight at a time: the way back from lossless_numbers.cuh.
#pragma once
#include "lossless_numbers.cuh"

namespace fastloss {

// Eight numbers from `at` on, zeros beyond the last; `numbers` lie at a multiple of 16 bytes.
template <int NUMBER>
__device__ inline void load_eight(unsigned (&word)[Parts<NUMBER>::kWords], const void *numbers, int64_t at,
                                  int64_t numel) {
  using P = Parts<NUMBER>;
  if (at + 8 <= numel) {
    if constexpr (P::kWords == 2) {
      const uint2 v = __ldcs(static_cast<const uint2 *>(numbers) + at / 8);
      word[0] = v.x, word[1] = v.y;
    } else {
#pragma unroll
      for (int w = 0; w < P::kWords; w += 4) {
        const uint4 v = __ldcs(static_cast<const uint4 *>(numbers) + (at * P::kBytes + w * 4) / 16);
        word[w] = v.x, word[w + 1] = v.y, word[w + 2] = v.z, word[w + 3] = v.w;
      }
    }
    return;
  }
  constexpr int kEach = 4 / P::kBytes;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const unsigned n = at + k < numel ? static_cast<const typename P::Integer *>(numbers)[at + k] : 0;
    if (k % kEach == 0) word[k / kEach] = n;
    else word[k / kEach] |= n << k % kEach * 8 * P::kBytes;
  }
}

// The lower bytes of the halves of four words.
__device__ inline uint2 even_bytes(const unsigned (&half)[4]) {
  return make_uint2(__byte_perm(half[0], half[1], 0x6420), __byte_perm(half[2], half[3], 0x6420));
}

// The fields, a byte each.
template <int NUMBER> __device__ inline uint2 fields_of(const unsigned (&word)[Parts<NUMBER>::kWords]) {
  if constexpr (NUMBER == kBf16 || NUMBER == kFp16) {
    unsigned half[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) half[q] = NUMBER == kBf16 ? word[q] >> 7 & 0xff00ff : word[q] >> 10 & 0x1f001f;
    return even_bytes(half);
  } else if constexpr (NUMBER == kFp32) {
    uint2 fields = make_uint2(0, 0);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      fields.x |= (word[k] >> 23 & 255) << 8 * k;
      fields.y |= (word[4 + k] >> 23 & 255) << 8 * k;
    }
    return fields;
  } else {
    const int shift = NUMBER == kE4m3 ? 3 : 2;
    const unsigned mask = NUMBER == kE4m3 ? 0x0f0f0f0f : 0x1f1f1f1f;
    return make_uint2(word[0] >> shift & mask, word[1] >> shift & mask);
  }
}

// What is left of the numbers.
template <int NUMBER> __device__ inline Rest<NUMBER> rest_of(const unsigned (&word)[Parts<NUMBER>::kWords]) {
  Rest<NUMBER> rest = {};
  if constexpr (NUMBER == kBf16 || NUMBER == kFp16) {
    unsigned half[4];
#pragma unroll
    for (int q = 0; q < 4; ++q)
      half[q] = NUMBER == kBf16 ? (word[q] & 0x7f007f) | (word[q] >> 8 & 0x800080) : word[q] & 0xff00ff;
    rest.bytes[0] = even_bytes(half);
    if constexpr (NUMBER == kFp16) {
#pragma unroll
      for (int p = 0; p < 3; ++p)
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const unsigned two = word[q] >> (p < 2 ? 8 + p : 15) & 0x10001;
          rest.bits[p] |= ((two | two >> 15) & 3) << 2 * q;
        }
    }
  } else if constexpr (NUMBER == kFp32) {
#pragma unroll
    for (int k = 0; k < 8; ++k)
#pragma unroll
      for (int p = 0; p < 3; ++p) {
        const unsigned byte = p < 2 ? word[k] >> 8 * p & 255 : (word[k] >> 16 & 127) | (word[k] >> 24 & 128);
        (k < 4 ? rest.bytes[p].x : rest.bytes[p].y) |= byte << 8 * (k % 4);
      }
  } else {
    constexpr int kBits = Parts<NUMBER>::kBits;
#pragma unroll
    for (int p = 0; p < kBits; ++p)
#pragma unroll
      for (int h = 0; h < 2; ++h) { // bits 0, 8, 16, 24 come together at 24
        const unsigned four = word[h] >> (p == kBits - 1 ? 7 : p) & 0x01010101;
        rest.bits[p] |= four * 0x01020408 >> 24 << 4 * h;
      }
  }
  return rest;
}

// Stores what is left where decoders look for it; `numbers`: how many the block has, padded.
template <int NUMBER>
__device__ inline void store_rest(const SplitPlanes &to, int64_t block, int numbers, int eight,
                                  const Rest<NUMBER> &rest) {
  using P = Parts<NUMBER>;
#pragma unroll
  for (int p = 0; p < P::kPlanes; ++p)
    reinterpret_cast<uint2 *>(to.bytes[p] + block * kLosslessBlock)[eight] = rest.bytes[p];
#pragma unroll
  for (int p = 0; p < P::kBits; ++p)
    to.bits[block * (P::kBits * kEights) + p * (numbers / 8) + eight] = uint8_t(rest.bits[p]);
}

} // namespace fastloss
