// How the kernels that go between numbers and bits walk over a matrix: in blocks of up to 512 columns of a row, which
// are 64 bytes of bits and fit L1 as fp32. A task is a range of blocks, cut where the shape says, whatever the number
// of threads: sums have one order.
#pragma once
#include "../bits.h"
#include "cpu.h"

#include <algorithm>
#include <cstring>
#include <omp.h>
#include <stdexcept>
#include <string>

namespace fastloss {
namespace {

constexpr int64_t kBlock = 8 * kRowBytes;
constexpr int64_t kMostTasks = 128, kLeastBlocks = 64; // of a task
constexpr int64_t kSerial = 1 << 15;                   // elements that are not worth waking a second thread
constexpr int64_t kStreamed = 16 << 20;                // bytes of a result that would push everything else out of cache

struct Block {
  int64_t row, column, count;
  int64_t flat; // row * columns + column
  int64_t bits; // where its 64 bytes begin in a plane
};

class Blocks {
public:
  Blocks(int64_t rows, int64_t columns)
      : rows_(rows), columns_(columns), across_((columns + kBlock - 1) / kBlock), total_(rows * across_),
        each_(std::max(kLeastBlocks, (total_ + kMostTasks - 1) / kMostTasks)) {}

  int64_t tasks() const { return (total_ + each_ - 1) / each_; }
  // The flat elements of a task.
  int64_t begin(int64_t task) const { return task * each_ < total_ ? at(task * each_).flat : rows_ * columns_; }

  template <class Body> void each(int64_t task, const Body &body) const {
    for (int64_t i = task * each_; i < std::min(total_, (task + 1) * each_); ++i) body(at(i));
  }

  // body(task), on as many threads as pay.
  template <class Body> void run(const Body &body) const {
    const int64_t count = tasks();
    const int threads = rows_ * columns_ <= kSerial ? 1 : int(std::min<int64_t>(omp_get_max_threads(), count));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < count; ++task) body(task);
  }

private:
  int64_t rows_, columns_, across_, total_, each_;

  Block at(int64_t i) const {
    const int64_t row = i / across_, column = i % across_ * kBlock;
    return {row, column, std::min(kBlock, columns_ - column), row * columns_ + column, i * kRowBytes};
  }
};

// Numbers that elements share, laid out beside a block: the first `left` elements have number `at`, then each `run`
// elements the next one, number 0 after the last.
class Laid {
public:
  explicit Laid(float value) { fill(value); }

  const float *lay(const float *values, int64_t count, int64_t at, int64_t left, int64_t run, int64_t elements) {
    if (left >= elements) {
      if (!same_ || memcmp(&value_, &values[at], sizeof value_)) fill(values[at]);
      return room_;
    }
    same_ = false;
    for (int64_t i = 0; i < elements; at = at + 1 == count ? 0 : at + 1) {
      if (run == 1) { // neighbours have neighbouring numbers
        const int64_t some = std::min(count - at, elements - i);
        memcpy(room_ + i, values + at, size_t(some) * sizeof *values);
        i += some, at += some - 1;
        continue;
      }
      const int64_t some = std::min(left, elements - i);
      std::fill(room_ + i, room_ + i + some, values[at]);
      i += some, left = run;
    }
    return room_;
  }

  const float *room() const { return room_; }

private:
  alignas(64) float room_[kBlock];
  float value_;
  bool same_;

  void fill(float value) {
    std::fill(room_, room_ + kBlock, value);
    value_ = value, same_ = true;
  }
};

inline int64_t bytes_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

inline const char *element(const void *data, int dtype, int64_t i) {
  return static_cast<const char *>(data) + i * bytes_of(dtype);
}
inline char *element(void *data, int dtype, int64_t i) { return static_cast<char *>(data) + i * bytes_of(dtype); }

inline int level_for(int isa) {
  const int best = best_isa();
  if (isa < kBestIsa || isa > best)
    throw std::invalid_argument("isa must be -1 (best) to " + std::to_string(best) + " (" + isa_name(best) +
                                ") on this machine, got " + std::to_string(isa));
  return isa == kBestIsa ? best : isa;
}

} // namespace
} // namespace fastloss
