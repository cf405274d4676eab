// What R8's encoders start from: the slots of each byte, and room for one block.
#pragma once
#include "../lossless.h"

#include <numeric>
#include <stdexcept>
#include <string>

namespace fastloss {
namespace {

constexpr int kEscape = 256;

struct RansSymbols {
  int frequency[kEscape + 1], start[kEscape + 1]; // of all bytes and, last, of the escape; 0 slots: escaped
};

inline RansSymbols symbols_of(const uint8_t *frequencies) {
  const int sum = std::accumulate(frequencies, frequencies + kEscape, 0);
  if (sum < 1 || sum > 255)
    throw std::invalid_argument("frequencies must share 1 to 255 of 256 slots, got " + std::to_string(sum));
  RansSymbols symbols;
  int at = 0;
  for (int s = 0; s <= kEscape; ++s) {
    symbols.frequency[s] = s < kEscape ? frequencies[s] : 256 - sum;
    symbols.start[s] = at;
    at += symbols.frequency[s];
  }
  return symbols;
}

// One block as an encoder leaves it. It runs from the last number to the first, and so both lists are back to front:
// the stream must be turned round, while a payload holds literals in this very order.
struct RansBlock {
  static constexpr int kBefore = 64; // words that whole vectors may read before the stream; they may write 32 behind it
  alignas(64) uint16_t room[kBefore + kLosslessBlock + 32]; // of each word the low byte counts
  uint8_t literals[kLosslessBlock + 64];
  uint16_t states[kRansLanes];
  int64_t streamed, escaped;

  uint16_t *stream() { return room + kBefore; }
  const uint16_t *stream() const { return room + kBefore; }
};

} // namespace
} // namespace fastloss
