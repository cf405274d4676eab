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
  alignas(64) uint8_t room[64 + kLosslessBlock + 64]; // whole vectors are read before the stream, written behind it
  uint8_t literals[kLosslessBlock];
  uint16_t states[kRansLanes];
  int64_t streamed, escaped;

  uint8_t *stream() { return room + 64; }
  const uint8_t *stream() const { return room + 64; }
};

} // namespace
} // namespace fastloss
