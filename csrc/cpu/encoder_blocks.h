// How the encoders walk over blocks: each thread takes one run of consecutive blocks.
#pragma once
#include "../lossless.h"
#include "bit_blocks.h"

namespace fastloss {
namespace {

inline int64_t numbers_of_block(int64_t numel, int64_t block) {
  return std::min(kLosslessBlock, numel - block * kLosslessBlock);
}

constexpr int64_t kPiece = 1024; // numbers whose fields are counted at a time
constexpr int64_t kAhead = 4096; // bytes of numbers that are on their way meanwhile: counting is no time to read them

// Asks for cache lines, of which some may lie behind the end of what there is.
inline void prefetch(const uint8_t *from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

// What the next block needs, a few cache lines of it at each of `calls` calls: coding is no time to read memory.
struct Ahead {
  const uint8_t *at, *end;
  int64_t each; // bytes

  Ahead() : at(nullptr), end(nullptr), each(0) {}
  Ahead(const uint8_t *numbers, int64_t bytes, int64_t calls)
      : at(numbers), end(numbers + bytes), each(((bytes + calls - 1) / calls + 63) / 64 * 64) {}
  void some() {
    for (const uint8_t *until = std::min(at + each, end); at < until; at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// Two blocks are not worth waking a second thread.
inline int runs_of_blocks(int64_t numel) {
  return int(std::max<int64_t>(1, std::min<int64_t>(omp_get_max_threads(), lossless_blocks(numel) / 2)));
}

// body(run, first block, last block) of every run.
template <class Body> void each_run_of_blocks(int64_t numel, const Body &body) {
  const int64_t blocks = lossless_blocks(numel), runs = runs_of_blocks(numel);
#pragma omp parallel for schedule(static) num_threads(int(runs)) if (runs > 1)
  for (int64_t run = 0; run < runs; ++run) body(int(run), run * blocks / runs, (run + 1) * blocks / runs);
}

} // namespace
} // namespace fastloss
