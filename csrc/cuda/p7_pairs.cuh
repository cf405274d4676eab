// P7 (docs/design.md, "The lossless contract"): fields of pairs from 7-bit codes, and the pairs that have no code.
#pragma once
#include "lossless_numbers.cuh"

namespace fastloss {

constexpr int kPairCodes = 128;
constexpr int kCodeBytes = int(kLosslessBlock / kLosslessGroup * 56); // of a block

// Two fields as they stand in the words of their numbers: of 32-bit numbers the second 16 bits lower.
template <int NUMBER> __device__ inline unsigned pair_entry(const uint8_t *table, int code) {
  const unsigned a = __ldg(table + code), b = __ldg(table + kPairCodes + code);
  if (NUMBER == kFp16) return (a & 31) << 10 | (b & 31) << 26;
  return NUMBER == kBf16 ? a << 7 | b << 23 : a << 23 | b << 7;
}

// The fields of eight numbers. entry(n) is that of code (bits >> 7 n) & 127.
template <int NUMBER, class F> __device__ inline void pair_fields(unsigned (&word)[Parts<NUMBER>::kWords], F entry) {
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const unsigned e = entry(q);
    if constexpr (NUMBER == kFp32) {
      word[2 * q] = e & 0x7f800000;
      word[2 * q + 1] = e << 16 & 0x7f800000;
    } else word[q] = e;
  }
}

// Writes the escapes of a block over: of its pairs put(number, value) is called for both numbers, by `threads` threads.
// Offsets are clamped to the list, a block's count to its pairs (hostile ones would have every block walk the whole
// list), and positions beyond the block are skipped.
template <int NUMBER, class F>
__device__ inline void put_escapes(const Compressed &c, int64_t block, int thread, int threads, F put) {
  using Integer = typename Parts<NUMBER>::Integer;
  if (c.escapes == 0) return;
  const auto bound = [&](int64_t at) {
    return max(int64_t(0), min(c.escapes, int64_t(__ldg(reinterpret_cast<const long long *>(c.escape_offsets) + at))));
  };
  const Integer *const values = static_cast<const Integer *>(c.escape_values);
  const int64_t begin = bound(block), end = min(bound(block + 1), begin + kLosslessBlock / 2); // no more pairs
  for (int64_t e = begin + thread; e < end; e += threads) {
    const int position = __ldg(c.escape_positions + e);
    if (position >= kLosslessBlock / 2) continue;
    const int64_t number = block * kLosslessBlock + 2 * position;
    if (number < c.numel) put(number, __ldg(values + 2 * e));
    if (number + 1 < c.numel) put(number + 1, __ldg(values + 2 * e + 1));
  }
}

} // namespace fastloss
