// What Philox 4x32-10 needs besides its loop (philox.inc): Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3"
// (2011).
#pragma once
#include "simd_bits.h"

namespace fastloss {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxFactor[] = {0xD2511F53, 0xCD9E8D57}, kPhiloxStep[] = {0x9E3779B9, 0xBB67AE85};

// Where random bits come from.
struct Noise {
  uint32_t keys[kPhiloxRounds][2], stream[2];
};

inline Noise noise_of(uint64_t seed, uint64_t stream) {
  Noise noise;
  for (int half = 0; half < 2; ++half) {
    noise.stream[half] = uint32_t(stream >> 32 * half);
    for (int round = 0; round < kPhiloxRounds; ++round)
      noise.keys[round][half] = uint32_t(seed >> 32 * half) + uint32_t(round) * kPhiloxStep[half];
  }
  return noise;
}

} // namespace fastloss
