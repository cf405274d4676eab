// What the engines of lossless_linear.cpp multiply: a few rows of W at a time by all rows of x, laid out as they like
// it.
#pragma once
#include "p7_decode.h"

namespace fastloss {

constexpr int kRowsAtOnce = 16; // of W

// Consecutive rows of W, at most kRowsAtOnce.
struct CodedRows {
  const uint8_t *table, *codes, *low;
  int64_t columns, low_step; // bytes from a row of `low` to the next
  int count;

  const uint8_t *codes_of(int row) const { return codes + row * (columns / kLosslessGroup * kP7GroupBytes); }
  const uint8_t *low_of(int row) const { return low + row * low_step; }
};

using P7Fields = void (*)(const uint8_t *table, const uint8_t *codes, int64_t groups, uint8_t *fields);

struct LinearEngine {
  int64_t step;                     // rows of x are laid out in blocks of so many, zeros behind them
  int64_t item;                     // bytes of a laid out number
  int64_t (*room)(int64_t columns); // bytes that a thread needs
  void (*begin)(), (*end)();        // of a thread
  void (*lay)(const uint16_t *x, int64_t n, int64_t columns, void *laid);
  // sums[i * kRowsAtOnce + r] = <row i of x, row r of W>
  void (*multiply)(const CodedRows &w, const void *x, int64_t n, uint8_t *room, float *sums);
};

} // namespace fastloss
