// The engines of bit_products.h and which of them is the fastest for a shape.
#include "bit_products.h"
#include "bit_panels.h"
#include "bit_words.h"
#include "kept_memory.h"
#include "linear_tiles_amx.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <omp.h>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastloss {
namespace {

// ys rows of y times xs rows of x, all of `bytes` bytes: sums[i x_step + j y_step] += weight * (ones in common).
struct BitDots {
  const uint8_t *x, *y;
  int64_t xs, ys, bytes, x_step, y_step;
  int32_t weight;
  int32_t *sums;
};

} // namespace

#define FASTLOSS_WITHOUT_BF16
#define FASTLOSS_LOOPS "bit_dots.inc"
#include "each_isa.inc"
#ifdef __x86_64__
#define FASTLOSS_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq"
#define FASTLOSS_LOOP static __attribute__((target(FASTLOSS_TARGET)))
#define FASTLOSS_INLINE static inline __attribute__((target(FASTLOSS_TARGET), always_inline))
namespace popcount512 {
namespace {
#include FASTLOSS_LOOPS
} // namespace
} // namespace popcount512
#undef FASTLOSS_TARGET
#undef FASTLOSS_LOOP
#undef FASTLOSS_INLINE
#endif
#undef FASTLOSS_LOOPS

namespace {

constexpr int64_t kPanelRows = 32;       // of a that are multiplied at once
constexpr int64_t kBlockColumns = 256;   // of the sums that a consumer gets at once: with 32 rows, 32 KB
constexpr int64_t kRightBytes = 1 << 20; // of right panels: half of a second-level cache
constexpr int64_t kDeepSteps = 64;       // steps of a right panel of that size
constexpr int64_t kTallRows = 256;       // rows whose sums wait where the columns come in several such parts
constexpr int64_t kSerial = 1 << 24;     // pairs of bits that are not worth waking a second thread

int64_t up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

struct Freed {
  size_t bytes;
  void operator()(void *memory) const { give_memory(memory, bytes); }
};
template <class T> using Buffer = std::unique_ptr<T[], Freed>;
template <class T> Buffer<T> allocate(int64_t count) {
  const size_t bytes = size_t(up(count * int64_t(sizeof(T)) + 64, 64));
  return Buffer<T>(static_cast<T *>(take_memory(bytes)), Freed{bytes});
}

// sum over the planes of weights_p popcounts_p, of each row.
std::vector<int32_t> row_sums(const Planes &planes) {
  std::vector<int32_t> sums(size_t(planes.rows), 0);
  for (int p = 0; p < planes.count; ++p)
    for (int64_t i = 0; i < planes.rows; ++i)
      sums[size_t(i)] += planes.weights[p] * planes.popcounts[p * planes.rows + i];
  return sums;
}

// How the work is cut: tasks of `rows` x `columns`, all those of a block of columns after each other.
struct Cut {
  int64_t rows, columns, row_tasks, tasks;
  Cut(const BitProducts &products, int64_t most_columns, int64_t least_rows, int threads)
      : columns(std::min(most_columns, up(products.b.rows, kPanelRows))) {
    const int64_t blocks = up(products.b.rows, columns) / columns;
    const int64_t wanted = threads > 1 ? 6 * threads : 1; // so many that nobody waits long for the last one
    const int64_t pieces = std::max<int64_t>(1, wanted / blocks);
    rows = std::max(least_rows, up((products.a.rows + pieces - 1) / pieces, kPanelRows));
    row_tasks = up(products.a.rows, rows) / rows;
    tasks = blocks * row_tasks;
  }
};

struct Task {
  int64_t row, last_row, column, columns;
};
Task task_of(const Cut &cut, const BitProducts &products, int64_t task) {
  const int64_t row = task % cut.row_tasks * cut.rows, column = task / cut.row_tasks * cut.columns;
  return {row, std::min(products.a.rows, row + cut.rows), column, std::min(cut.columns, products.b.rows - column)};
}

// ------------------------------------------------------------------------------------------------- ones of words

typedef void (*Dots)(const BitDots &);

void multiply_words(const BitProducts &products, Dots dots, int64_t across, BitConsumer *const *consumers,
                    int threads) {
  const Planes &a = products.a, &b = products.b;
  const int64_t bytes = row_bytes(a.columns);
  const std::vector<int32_t> a_sums = row_sums(a), b_sums = row_sums(b);
  const Cut cut(products, kBlockColumns, kPanelRows, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    BitConsumer &consumer = *consumers[omp_get_thread_num()];
    alignas(64) int32_t sums[kPanelRows * kBlockColumns];
#pragma omp for schedule(monotonic : dynamic)
    for (int64_t number = 0; number < cut.tasks; ++number) {
      const auto [first, last, column, columns] = task_of(cut, products, number);
      const int64_t stride = up(columns, kPanelRows);
      for (int64_t row = first; row < last; row += kPanelRows) {
        const int64_t rows = std::min(kPanelRows, last - row);
        for (int64_t i = 0; i < rows; ++i) {
          const int32_t start = b.offset * a_sums[size_t(row + i)] + int32_t(a.columns * a.offset * b.offset);
          for (int64_t j = 0; j < columns; ++j) sums[i * stride + j] = start + a.offset * b_sums[size_t(column + j)];
        }
        for (int s = 0; s < a.count; ++s)
          for (int t = 0; t < b.count; ++t) {
            const uint8_t *x = a.bits + (s * a.rows + row) * bytes, *y = b.bits + (t * b.rows + column) * bytes;
            const int32_t weight = a.weights[s] * b.weights[t];
            // The side with more rows goes across the registers.
            if (columns >= std::min(across, rows)) dots({x, y, rows, columns, bytes, stride, 1, weight, sums});
            else dots({y, x, columns, rows, bytes, 1, stride, weight, sums});
          }
        consumer.take({row, rows, column, columns, stride, sums});
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------- panels of int8

#ifdef __x86_64__

typedef void (*LeftPanel)(const Planes &, int64_t, int64_t, int64_t, int64_t, int, uint8_t *);
typedef void (*RightPanel)(const Planes &, int64_t, int64_t, int64_t, uint8_t *);

constexpr LeftPanel kLeftPanels[] = {&bits::left_panel<1>, &bits::left_panel<2>, &bits::left_panel<3>,
                                     &bits::left_panel<4>};
constexpr RightPanel kRightPanels[] = {&bits::right_panel<1>, &bits::right_panel<2>, &bits::right_panel<3>,
                                       &bits::right_panel<4>};

template <class Panels> class PanelWorker {
public:
  PanelWorker(const BitProducts &products, const Cut &cut, BitConsumer &consumer)
      : a(products.a), b(products.b), consumer(consumer), steps(bits::steps_of(a.columns)),
        deep(std::min(steps, kDeepSteps)), stripe(steps > deep ? std::min(cut.rows, kTallRows) : kPanelRows),
        width(std::min(cut.columns, kBlockColumns)), left(allocate<uint8_t>(deep * bits::kStepBytes)),
        right(allocate<uint8_t>(up(cut.columns, kPanelRows) / kPanelRows * deep * bits::kStepBytes)),
        sums(allocate<int32_t>(stripe * (steps > deep ? cut.columns : width))) {}

  void run(const Task &task) {
    for (int64_t row = task.row; row < task.last_row; row += stripe) {
      const int64_t rows = std::min(stripe, task.last_row - row);
      if (steps <= deep) one_part(row, rows, task.column, task.columns);
      else all_parts(row, rows, task.column, task.columns);
    }
  }

private:
  const Planes &a, &b;
  BitConsumer &consumer;
  const int64_t steps, deep, stripe, width;
  Buffer<uint8_t> left, right;
  Buffer<int32_t> sums;
  int64_t held_column = -1, held_step = -1; // what the right panels are of

  void hold(int64_t column, int64_t columns, int64_t begin, int64_t end) {
    if (column == held_column && begin == held_step) return;
    for (int64_t j = 0; j < columns; j += kPanelRows)
      kRightPanels[b.count - 1](b, column + j, begin, end, right.get() + j / kPanelRows * deep * bits::kStepBytes);
    held_column = column, held_step = begin;
  }

  // The left panel, `rows` of it, with lanes [from, to) of the held columns.
  void multiply(int64_t rows, int64_t from, int64_t to, int64_t count, int32_t *into, int64_t stride, bool accumulate) {
    for (int64_t j = from; j < to; j += kPanelRows)
      Panels::multiply(left.get(), right.get() + j / kPanelRows * deep * bits::kStepBytes, count, rows, to - j,
                       into + j - from, stride, accumulate);
  }

  void one_part(int64_t row, int64_t rows, int64_t column, int64_t columns) {
    hold(column, columns, 0, steps);
    kLeftPanels[a.count - 1](a, row, rows, 0, steps, Panels::kLift, left.get());
    for (int64_t from = 0; from < columns; from += width) {
      const int64_t count = std::min(width, columns - from), stride = up(count, kPanelRows);
      multiply(rows, from, from + count, steps, sums.get(), stride, false);
      consumer.take({row, rows, column + from, count, stride, sums.get()});
    }
  }

  void all_parts(int64_t row, int64_t rows, int64_t column, int64_t columns) {
    const int64_t stride = up(columns, kPanelRows);
    for (int64_t begin = 0; begin < steps; begin += deep) {
      const int64_t end = std::min(steps, begin + deep);
      hold(column, columns, begin, end);
      for (int64_t i = 0; i < rows; i += kPanelRows) {
        const int64_t count = std::min(kPanelRows, rows - i);
        kLeftPanels[a.count - 1](a, row + i, count, begin, end, Panels::kLift, left.get());
        multiply(count, 0, columns, end - begin, sums.get() + i * stride, stride, begin > 0);
      }
    }
    for (int64_t i = 0; i < rows; i += kPanelRows)
      consumer.take({row + i, std::min(kPanelRows, rows - i), column, columns, stride, sums.get() + i * stride});
  }
};

template <class Panels> void multiply_panels(const BitProducts &products, BitConsumer *const *consumers, int threads) {
  const int64_t steps = bits::steps_of(products.a.columns), fitting = kRightBytes / (steps * bits::kStepColumns);
  const Cut cut(products, std::max(kBlockColumns, fitting / kBlockColumns * kBlockColumns),
                steps > kDeepSteps ? kTallRows : kPanelRows, threads);
  std::vector<PanelWorker<Panels>> workers; // made here: an exception may not leave a parallel region
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

#endif

// ------------------------------------------------------------------------------------------------- which engine

// Cycles of one thread, roughly: what a step costs on each engine, and what it takes to make panels.
double cost(const BitProducts &products, int engine) {
  const double m = double(products.a.rows), n = double(products.b.rows);
  if (engine == kPopcountEngine || engine == kTableEngine) {
    const double words = double(row_bytes(products.a.columns)) / 64, pairs = products.a.count * products.b.count;
    return m * n * pairs * (words * (engine == kPopcountEngine ? 1.5 : 4) + 3);
  }
  const double steps = double((products.a.columns + 63) / 64), blocks = std::ceil(n / kBlockColumns);
  const double panels = steps * (m * blocks * (1 + products.a.count) + n * (1 + products.b.count));
  const double tiles = std::ceil(m / 16) * std::ceil(n / 16) * (steps + 4);
  return panels + (engine == kAmxEngine ? 16 * tiles : m * std::ceil(n / 16) * 8 * steps) + m * n / 8 + 2000;
}

int best_engine(const BitProducts &products, int level) {
  int best = kTableEngine;
  if (level < kAvx512) return best;
  for (int engine : {kPopcountEngine, kVnniEngine, kAmxEngine})
    if (has_bit_engine(engine) && cost(products, engine) < cost(products, best)) best = engine;
  return best;
}

} // namespace

bool has_bit_engine([[maybe_unused]] int engine) {
  if (engine == kTableEngine) return true;
#ifdef __x86_64__
  if (best_isa() < kAvx512) return false;
  if (engine == kPopcountEngine) return __builtin_cpu_supports("avx512vpopcntdq");
  if (engine == kVnniEngine) return __builtin_cpu_supports("avx512vnni");
  if (engine == kAmxEngine) return linear::has_amx_int8();
#endif
  return false;
}

int checked_level(int isa, int engine) {
  const int best = best_isa(), level = isa == kBestIsa ? best : isa;
  if (isa < kBestIsa || isa > best)
    throw std::invalid_argument("isa must be -1 (best) to " + std::to_string(best) + " (" + isa_name(best) +
                                ") on this machine, got " + std::to_string(isa));
  if (engine != kBestEngine && (!has_bit_engine(engine) || (engine > kTableEngine && level < kAvx512)))
    throw std::invalid_argument("engine must be -1 (best) or one that this machine and isa " +
                                std::string(isa_name(level)) + " have, got " + std::to_string(engine));
  return level;
}

int bit_threads(const BitProducts &products) {
  const double pairs = double(products.a.rows) * double(products.b.rows) * double(products.a.columns) *
                       products.a.count * products.b.count;
  return pairs <= double(kSerial) ? 1 : omp_get_max_threads();
}

void multiply_bits(const BitProducts &products, BitConsumer *const *consumers, int threads) {
  const int level = checked_level(products.isa, products.engine);
  if (products.a.rows == 0 || products.b.rows == 0) return;
#ifdef __x86_64__
  int engine = products.engine == kBestEngine ? best_engine(products, level) : products.engine;
  if (products.a.columns == 0) engine = kTableEngine; // a panel has a step at least
  if (engine == kAmxEngine) return multiply_panels<bits::AmxPanels>(products, consumers, threads);
  if (engine == kVnniEngine) return multiply_panels<bits::VnniPanels>(products, consumers, threads);
  if (engine == kPopcountEngine)
    return multiply_words(products, &popcount512::bit_dots, popcount512::kAcross, consumers, threads);
  if (level >= kAvx512) return multiply_words(products, &avx512::bit_dots, avx512::kAcross, consumers, threads);
  if (level >= kAvx2) return multiply_words(products, &avx2::bit_dots, avx2::kAcross, consumers, threads);
#endif
  multiply_words(products, &scalar::bit_dots, scalar::kAcross, consumers, threads);
}

} // namespace fastloss
