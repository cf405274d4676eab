// Products of rows of bits by the engines that multiply int8: right panels of a block of columns stay in the
// second-level cache while left panels of all rows pass.
#pragma once
#include "bit_cut.h"
#include "bit_panels.h"
#include "kept_memory.h"

#include <omp.h>
#include <vector>

#ifdef __x86_64__

namespace fastloss::bits {

constexpr int64_t kRightBytes = 1 << 20; // of right panels: half of a second-level cache
constexpr int64_t kDeepSteps = 64;       // steps of kBlockColumns columns of that size
constexpr int64_t kTallRows = 256;       // rows whose sums wait where the columns come in several such parts

// Memory for one call: what is large comes from the kept memory, whose pages are there already.
class Scratch {
public:
  explicit Scratch(int64_t bytes)
      : bytes(bytes < kWorthKeeping ? size_t(bytes) : std::max(size_t(bytes), kLargeBlock)),
        memory(static_cast<uint8_t *>(take_memory(this->bytes))) {}
  Scratch(Scratch &&other) : bytes(other.bytes), memory(other.memory) { other.memory = nullptr; }
  ~Scratch() {
    if (memory) give_memory(memory, bytes);
  }
  uint8_t *get() const { return memory; }

private:
  static constexpr int64_t kWorthKeeping = 1 << 17; // from here on malloc would ask the system for fresh pages
  const size_t bytes;
  uint8_t *memory;
};

typedef void (*LeftPanel)(const Planes &, int64_t, int64_t, int64_t, int64_t, int, uint8_t *);
typedef void (*RightPanel)(const Planes &, int64_t, int64_t, int64_t, uint8_t *);

constexpr LeftPanel kLeftPanels[] = {&left_panel<1>, &left_panel<2>, &left_panel<3>, &left_panel<4>};
constexpr RightPanel kRightPanels[] = {&right_panel<1>, &right_panel<2>, &right_panel<3>, &right_panel<4>};

// Works on the tasks of one thread.
template <class Panels> class PanelWorker {
public:
  PanelWorker(const BitProducts &products, const Cut &cut, BitConsumer &consumer)
      : a(products.a), b(products.b), make_left(kLeftPanels[a.count - 1]), make_right(kRightPanels[b.count - 1]),
        consumer(consumer), steps(steps_of(a.columns)), deep(std::min(steps, kDeepSteps)),
        stripe(steps > deep ? std::min(cut.rows, kTallRows) : kPanelRows), width(std::min(cut.columns, kBlockColumns)),
        scratch(deep * kStepBytes * (1 + up(cut.columns, kPanelRows) / kPanelRows) +
                stripe * (steps > deep ? cut.columns : width) * int64_t(sizeof(int32_t))),
        left(scratch.get()), right(left + deep * kStepBytes),
        sums(reinterpret_cast<int32_t *>(right + up(cut.columns, kPanelRows) / kPanelRows * deep * kStepBytes)) {}

  void run(const Task &task) {
    if (steps <= deep) return one_part(task);
    for (int64_t row = task.row; row < task.last_row; row += stripe)
      all_parts(row, std::min(stripe, task.last_row - row), task.column, task.columns);
  }

private:
  const Planes &a, &b;
  const LeftPanel make_left;
  const RightPanel make_right;
  BitConsumer &consumer;
  const int64_t steps, deep, stripe, width;
  Scratch scratch;
  uint8_t *const left, *const right;
  int32_t *const sums;
  int64_t held_column = -1, held_step = -1; // what the right panels are of

  void hold(int64_t column, int64_t columns, int64_t begin, int64_t end) {
    if (column == held_column && begin == held_step) return;
    for (int64_t j = 0; j < columns; j += kPanelRows)
      make_right(b, column + j, begin, end, right + j / kPanelRows * deep * kStepBytes);
    held_column = column, held_step = begin;
  }

  // The left panel, `rows` of it, with lanes [from, to) of the held columns.
  void multiply(int64_t rows, int64_t from, int64_t to, int64_t count, int32_t *into, int64_t stride, bool accumulate) {
    for (int64_t j = from; j < to; j += kPanelRows)
      Panels::multiply(left, right + j / kPanelRows * deep * kStepBytes, count, rows, to - j, into + j - from, stride,
                       accumulate);
  }

  void one_part(const Task &task) {
    hold(task.column, task.columns, 0, steps);
    for (int64_t row = task.row; row < task.last_row; row += kPanelRows) {
      const int64_t rows = std::min(kPanelRows, task.last_row - row);
      make_left(a, row, rows, 0, steps, Panels::kLift, left);
      for (int64_t from = 0; from < task.columns; from += width) {
        const int64_t count = std::min(width, task.columns - from), stride = up(count, kPanelRows);
        multiply(rows, from, from + count, steps, sums, stride, false);
        consumer.take({row, rows, task.column + from, count, stride, sums});
      }
    }
  }

  void all_parts(int64_t row, int64_t rows, int64_t column, int64_t columns) {
    const int64_t stride = up(columns, kPanelRows);
    for (int64_t begin = 0; begin < steps; begin += deep) {
      const int64_t end = std::min(steps, begin + deep);
      hold(column, columns, begin, end);
      for (int64_t i = 0; i < rows; i += kPanelRows) {
        const int64_t count = std::min(kPanelRows, rows - i);
        make_left(a, row + i, count, begin, end, Panels::kLift, left);
        multiply(count, 0, columns, end - begin, sums + i * stride, stride, begin > 0);
      }
    }
    for (int64_t i = 0; i < rows; i += kPanelRows)
      consumer.take({row + i, std::min(kPanelRows, rows - i), column, columns, stride, sums + i * stride});
  }
};

template <class Panels> void multiply_panels(const BitProducts &products, BitConsumer *const *consumers, int threads) {
  const int64_t steps = steps_of(products.a.columns), fitting = kRightBytes / (steps * kStepColumns);
  const Cut cut(products, std::max(kBlockColumns, fitting / kBlockColumns * kBlockColumns),
                steps > kDeepSteps ? kTallRows : kPanelRows, threads);
  std::vector<PanelWorker<Panels>> workers; // made here: an exception may not leave a parallel region
  workers.reserve(size_t(threads));
  for (int thread = 0; thread < threads; ++thread) workers.emplace_back(products, cut, *consumers[thread]);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    PanelWorker<Panels> &worker = workers[size_t(omp_get_thread_num())];
    Panels::begin();
#pragma omp for schedule(monotonic : dynamic)
    for (int64_t number = 0; number < cut.tasks; ++number) worker.run(task_of(cut, products, number));
    Panels::end();
  }
}

} // namespace fastloss::bits

#endif
