// What the engines of lossless_linear.cpp multiply: a few rows of W at a time by all rows of x, laid out as they like
// it.
#pragma once
#include "p7_decode.h"
#include "simd.h"

namespace fastloss {

constexpr int kFewRowsAtOnce = 16, kRowsAtOnce = 64; // of W: a thread takes so many

// Consecutive rows of W, at most kRowsAtOnce.
struct CodedRows {
  const uint8_t *table, *codes, *low;
  int64_t columns, low_step; // bytes from a row of `low` to the next
  int count;

  int64_t code_step() const { return columns / kLosslessGroup * kP7GroupBytes; }
  const uint8_t *codes_of(int row) const { return codes + row * code_step(); }
  const uint8_t *low_of(int row) const { return low + row * low_step; }
};

using P7Fields = void (*)(const uint8_t *table, const uint8_t *codes, int64_t groups, uint8_t *fields);

// All rows of x, as the caller has them and laid out.
struct LaidRows {
  const uint16_t *x; // [n][columns] bf16
  int64_t n, columns;
  void *laid;
  int64_t stride; // n rounded up to whole blocks of rows: from the sums of a row of W to those of the next
};

// Two neighbours in a row of W that have no code: numbers `column` and `column` + 1.
struct EscapedPair {
  int64_t sums, column; // sums: where those of its row of W begin
  float low, high;
};

// sums[r * stride + i] below: <row i of x, row r of W>.
struct LinearEngine {
  int64_t block;                    // rows of x are laid out in blocks of so many, zeros behind them
  int64_t item;                     // bytes of a laid out number
  int64_t (*room)(int64_t columns); // bytes that a thread needs
  void (*begin)(), (*end)();        // of a thread
  void (*lay)(const LaidRows &x, int64_t first, int64_t count); // columns: whole groups
  void (*multiply)(const CodedRows &w, const LaidRows &x, uint8_t *room, float *sums);
  void (*add_pairs)(const LaidRows &x, const EscapedPair *pairs, int count, float *sums);
  // out[i * rows + r] for r < count, rounded once; bias may be null.
  void (*write)(const LaidRows &x, const float *sums, int count, const uint16_t *bias, uint16_t *out, int64_t rows);
};

inline float wide(uint16_t x) { return to_float(BFloat16{x}); }

// LinearEngine::add_pairs and LinearEngine::write in plain code.
inline void add_pairs(const LaidRows &x, const EscapedPair *pairs, int count, float *sums) {
  for (const EscapedPair *pair = pairs; pair < pairs + count; ++pair)
    for (int64_t i = 0; i < x.n; ++i) {
      const uint16_t *at = x.x + i * x.columns + pair->column;
      sums[pair->sums + i] += pair->low * wide(at[0]) + pair->high * wide(at[1]);
    }
}

inline void write(const LaidRows &x, const float *sums, int count, const uint16_t *bias, uint16_t *out, int64_t rows) {
  for (int64_t i = 0; i < x.n; ++i, out += rows)
    for (int r = 0; r < count; ++r) {
      BFloat16 rounded;
      from_float(rounded, sums[r * x.stride + i] + (bias ? wide(bias[r]) : 0.f));
      out[r] = rounded.bits;
    }
}

} // namespace fastloss
