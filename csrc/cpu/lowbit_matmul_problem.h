// What all engines of lowbit_matmul see: one product y[m][n] = sum over the reduction of x value, whichever orientation
// was asked for. The bits lie along the reduction; those of a transposed product have been turned before.
#pragma once
#include "cpu.h"
#include "lowbit_matmul.h"
#include "simd.h"

#include <algorithm>
#include <vector>

namespace fastloss::lowbit {

constexpr int64_t kChunk = 512; // columns of a line of bits: 64 bytes, and what is unpacked at a time
constexpr int kCodes = 16;      // the numbers that four planes can say

struct Problem {
  const LowbitMatmul &args;
  const uint8_t *bits; // [planes][n][line]
  int64_t n, length, line;
  int64_t begin, end;  // the outputs that are asked for
  const float *factor; // [length]: x is times this, or null
  float values[kCodes];

  int64_t chunks() const { return (length + kChunk - 1) / kChunk; }
  int planes() const { return args.w.count; }
  const uint8_t *row(int plane, int64_t output) const { return bits + (plane * n + output) * line; }
  bool integer() const { return args.x_dtype == kInt8; }
  // Groups of the reduction have their own scale: each group's sum is scaled before it is added.
  bool grouped() const { return args.scale && !args.transposed && args.groups > 1; }
  float group_scale(int64_t output, int64_t group) const {
    return args.scale ? args.scale[(args.scale_rows == 1 ? 0 : output) * args.groups + group] : 1.f;
  }
  // What the finished sum of an output is times.
  float last_scale(int64_t output) const {
    if (!args.scale || factor || grouped()) return 1.f;
    return args.transposed ? args.scale[args.group ? output / args.group : 0] : group_scale(output, 0);
  }
  float row_scale(int64_t row) const { return args.x_scale ? args.x_scale[row] : 1.f; }
  float bias(int64_t output) const { return args.bias ? args.bias[output] : 0.f; }
};

// Columns [begin, end) of a chunk that share a scale. Their group begins with them (`first`), or ends (`last`), or
// both.
struct Segment {
  int64_t begin, end, group;
  bool first, last;
};

inline std::vector<Segment> segments(const Problem &p, int64_t chunk) {
  const int64_t first = chunk * kChunk, end = std::min(p.length, first + kChunk);
  if (!p.grouped()) return {{0, end - first, 0, chunk == 0, end == p.length}};
  std::vector<Segment> found;
  for (int64_t at = first; at < end;) {
    const int64_t group = at / p.args.group, begin = group * p.args.group;
    const int64_t stop = std::min(p.length, begin + p.args.group), next = std::min(stop, end);
    found.push_back({at - first, next - first, group, at == begin, next == stop});
    at = next;
  }
  return found;
}

template <class T> void float_columns(const Problem &p, const T *row, float *to) {
  for (int64_t k = 0; k < p.length; ++k) {
    if constexpr (sizeof(T) == 1) to[k] = float(row[k]);
    else to[k] = p.factor ? to_float(row[k]) * p.factor[k] : to_float(row[k]);
  }
}

// One row of x as floats, times their factors, with zeros up to the end of the last chunk.
inline void float_row(const Problem &p, int64_t row, float *to) {
  const void *x = p.args.x;
  const int64_t at = row * p.args.ldx;
  if (p.args.x_dtype == kFloat32) float_columns(p, static_cast<const float *>(x) + at, to);
  else if (p.args.x_dtype == kFloat16) float_columns(p, static_cast<const Float16 *>(x) + at, to);
  else if (p.args.x_dtype == kBFloat16) float_columns(p, static_cast<const BFloat16 *>(x) + at, to);
  else float_columns(p, static_cast<const int8_t *>(x) + at, to);
  std::fill(to + p.length, to + p.chunks() * kChunk, 0.f);
}

// A finished sum -> its place in y.
inline void finish(const Problem &p, int64_t row, int64_t output, float sum) {
  const float value = sum * p.last_scale(output), y = p.args.bias ? value + p.bias(output) : value;
  const int64_t at = row * p.n + output;
  if (p.args.y_dtype == kFloat32) from_float(static_cast<float *>(p.args.y)[at], y);
  else if (p.args.y_dtype == kFloat16) from_float(static_cast<Float16 *>(p.args.y)[at], y);
  else from_float(static_cast<BFloat16 *>(p.args.y)[at], y);
}

} // namespace fastloss::lowbit
