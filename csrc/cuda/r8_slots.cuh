// The 256 slots of a plane coded with R8, as a warp deals them to symbols: lane l has symbols 8 l to 8 l + 7.
#pragma once
#include "lossless_numbers.cuh"

namespace fastloss {

constexpr int kSlots = 256, kStateBytes = 2 * kRansLanes;
constexpr unsigned kEscape = 1u << 31; // marks what is not one of the symbols with slots

// Calls each(symbol, its frequency, its first slot, the sum of all frequencies) for the lane's symbols; that sum.
template <class Each> __device__ inline unsigned deal_slots(const uint8_t *frequencies, int lane, Each each) {
  const uint2 eight = __ldg(reinterpret_cast<const uint2 *>(frequencies) + lane);
  const auto frequency = [&](int k) { return (k < 4 ? eight.x : eight.y) >> 8 * (k % 4) & 255; };
  unsigned sum = 0;
#pragma unroll
  for (int k = 0; k < 8; ++k) sum += frequency(k);
  unsigned before = sum;
  for (unsigned step = 1; step < 32; step *= 2) {
    const unsigned lower = __shfl_up_sync(kWholeWarp, before, step);
    if (lane >= int(step)) before += lower;
  }
  const unsigned total = __shfl_sync(kWholeWarp, before, 31);
  unsigned first = before - sum;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const unsigned f = frequency(k);
    each(unsigned(8 * lane + k), f, first, total);
    first += f;
  }
  return total;
}

} // namespace fastloss
