// What all pair kernels know of a pairing before they sweep it, the same for every instruction set.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "../pair_stats.h"
#include "kept_memory.h"

namespace fastloss::pairs {

// The layouts are those of linear_tiles.h, also where no engine of that file exists.
constexpr int64_t kTile = 32;                  // rows of a left, lanes of a right operand: a panel
constexpr int64_t kStepUnits = 16;             // units of a step of the reduction
constexpr int64_t kBlock = kTile * kStepUnits; // units of one step of either operand
constexpr int64_t kProduct = kTile * kTile;    // floats of a product
constexpr int64_t kStepsAtOnce = 16;           // a long reduction is summed by blocks
constexpr int64_t kMostPanels = 16;            // column panels of a block
constexpr int64_t kRowPanels = 8;              // row panels that the gradient of columns takes at a time, at most

constexpr int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

struct GiveBack {
  size_t bytes = 0;
  void operator()(void *memory) const { give_memory(memory, bytes); }
};
template <class T> using Memory = std::unique_ptr<T[], GiveBack>;
template <class T> Memory<T> allocate(int64_t count) {
  const size_t bytes = size_t(std::max<int64_t>(count, 1)) * sizeof(T);
  return Memory<T>(static_cast<T *>(take_memory(bytes)), GiveBack{bytes});
}
template <class T> Memory<T> allocate_filled(int64_t count, T value) {
  Memory<T> memory = allocate<T>(count);
  std::fill_n(memory.get(), count, value);
  return memory;
}
// `count` numbers padded to whole panels; null: all are `otherwise`.
inline Memory<float> padded(const float *values, int64_t count, float otherwise) {
  Memory<float> memory = allocate_filled<float>(divide_up(count, kTile) * kTile, otherwise);
  if (values) std::copy_n(values, count, memory.get());
  return memory;
}

// Rows of d elements; those that are not valid are read as zeros.
struct Operand {
  const void *data;
  int64_t rows, d, ld;
  int dtype;
  const uint8_t *valid;

  // The rows of a panel by number, -1 for zeros.
  void numbers(int64_t panel, int64_t (&row_of)[kTile]) const {
    for (int64_t r = 0; r < kTile; ++r) {
      const int64_t row = panel * kTile + r;
      row_of[r] = row < rows && (!valid || valid[row]) ? row : -1;
    }
  }
};

struct Problem {
  const Pairing &pairing;
  Operand q, k, guide_q, guide_k;
  int64_t row_panels, column_panels;
  // Positives by diagonals alone are a few a row: their op handles them by themselves (pair_diagonals.inc) and a tile
  // treats them as excluded.
  bool diagonals_outside;
  Memory<float> row_scale, column_scale; // padded; column_scale only where the pairing has one

  Problem(const Pairing &p, bool outside)
      : pairing(p), q{p.q, p.m, p.d, p.ldq, p.dtype, p.row_valid}, k{p.k, p.n, p.d, p.ldk, p.dtype, p.column_valid},
        guide_q{p.guide_q, p.m, p.guide_d, p.ld_guide_q, p.guide_dtype, nullptr},
        guide_k{p.guide_k, p.n, p.guide_d, p.ld_guide_k, p.guide_dtype, nullptr}, row_panels(divide_up(p.m, kTile)),
        column_panels(divide_up(p.n, kTile)),
        diagonals_outside(outside && !p.positive.rows && p.positive.num_diagonals > 0),
        row_scale(padded(p.row_scale, p.m, 0)) {
    if (p.column_scale) column_scale = padded(p.column_scale, p.n, 0);
  }
};

// Products <q, k> that a forward keeps for its backward, in an order that depends on nothing but M and N. The first
// floats say whose they are: memory that another backend left alone holds something else.
struct Kept {
  float *memory = nullptr;
  int64_t count = 0, row_panels = 0;
  static constexpr int64_t kHeader = 16;

  Kept(float *floats, int64_t keep, const Problem &problem) : row_panels(problem.row_panels) {
    if (!floats || keep < kHeader + kProduct) return;
    memory = floats + kHeader;
    count = std::min((keep - kHeader) / kProduct, problem.row_panels * problem.column_panels);
  }
  // By the statistics that the forward has made of them.
  static uint64_t signature(const float *table, int64_t floats) {
    uint64_t hash = 0xcbf29ce484222325; // FNV-1a, a number at a time
    for (int64_t i = 0; i < floats; ++i) {
      uint32_t bits;
      memcpy(&bits, table + i, sizeof bits);
      hash = (hash ^ bits) * 0x100000001b3;
    }
    return hash;
  }
  void sign(const float *table, int64_t floats) const {
    const uint64_t own = signature(table, floats);
    if (memory) memcpy(memory - kHeader, &own, sizeof own);
  }
  void forget_unless_signed(const float *table, int64_t floats) {
    const uint64_t own = signature(table, floats);
    if (memory && memcmp(memory - kHeader, &own, sizeof own) != 0) count = 0;
  }
  float *at(int64_t row_panel, int64_t column_panel) const {
    const int64_t number = column_panel * row_panels + row_panel;
    return number < count ? memory + number * kProduct : nullptr;
  }
};
inline int64_t kept_floats(int64_t m, int64_t n) {
  return Kept::kHeader + divide_up(m, kTile) * divide_up(n, kTile) * kProduct;
}

// Blocks of columns are dealt to threads in turn, and every block takes the row panels in order, each after the block
// before has left it. So every sum over columns has one order, whatever the threads do.
class Order {
  struct alignas(64) Progress {
    std::atomic<int64_t> panels{0};
  };
  std::vector<Progress> progress;

public:
  explicit Order(int64_t blocks) : progress(size_t(std::max<int64_t>(blocks, 1))) {}
  void wait(int64_t block, int64_t panels) const {
    if (block == 0) return;
    for (int spins = 0; progress[size_t(block - 1)].panels.load(std::memory_order_acquire) < panels; ++spins)
      if (spins > 64) std::this_thread::yield();
  }
  void leave(int64_t block, int64_t panels) { progress[size_t(block)].panels.store(panels, std::memory_order_release); }
};

} // namespace fastloss::pairs
