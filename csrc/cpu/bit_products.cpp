// The engines of bit_products.h and which of them is the fastest for a shape.
#include "bit_products.h"
#include "bit_cut.h"
#include "bit_panel_engine.h"
#include "bit_words.h"

#include <algorithm>
#include <cmath>
#include <omp.h>
#include <stdexcept>
#include <string>

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

constexpr int64_t kSerial = 1 << 24; // pairs of bits that are not worth waking a second thread

// sum over the planes of weights_p popcounts_p of a row.
int32_t row_sum(const Planes &planes, int64_t row) {
  int32_t sum = 0;
  for (int p = 0; p < planes.count; ++p) sum += planes.weights[p] * planes.popcounts[p * planes.rows + row];
  return sum;
}

// ------------------------------------------------------------------------------------------------- ones of words

typedef void (*Dots)(const BitDots &);

void multiply_words(const BitProducts &products, Dots dots, int64_t across, BitConsumer *const *consumers,
                    int threads) {
  const Planes &a = products.a, &b = products.b;
  const int64_t bytes = row_bytes(a.columns);
  const bits::Cut cut(products, bits::kBlockColumns, bits::kPanelRows, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    BitConsumer &consumer = *consumers[omp_get_thread_num()];
    alignas(64) int32_t sums[bits::kPanelRows * bits::kBlockColumns], start[bits::kBlockColumns];
#pragma omp for schedule(monotonic : dynamic)
    for (int64_t number = 0; number < cut.tasks; ++number) {
      const auto [first, last, column, columns] = bits::task_of(cut, products, number);
      const int64_t stride = bits::up(columns, bits::kPanelRows);
      for (int64_t j = 0; j < columns; ++j)
        start[j] = a.offset * (row_sum(b, column + j) + int32_t(a.columns) * b.offset);
      for (int64_t row = first; row < last; row += bits::kPanelRows) {
        const int64_t rows = std::min(bits::kPanelRows, last - row);
        for (int64_t i = 0; i < rows; ++i) {
          const int32_t more = b.offset * row_sum(a, row + i);
          for (int64_t j = 0; j < columns; ++j) sums[i * stride + j] = start[j] + more;
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

// ------------------------------------------------------------------------------------------------- which engine

// Cycles of one thread, as measured on Emerald Rapids.
double cost(const BitProducts &products, int engine) {
  const double m = double(products.a.rows), n = double(products.b.rows);
  const double a_planes = products.a.count, b_planes = products.b.count;
  if (engine == kPopcountEngine || engine == kTableEngine) {
    const double lines = double(row_bytes(products.a.columns)) / 64; // and a sum over lanes for each product
    return m * n * a_planes * b_planes * (lines * (engine == kPopcountEngine ? 1.5 : 4) + 3);
  }
  const double steps = std::ceil(double(products.a.columns) / 64), blocks = std::ceil(n / bits::kBlockColumns);
  const double panels =
      steps * (m * blocks * (4 + a_planes / 2) + n * (24 + b_planes / 2)) + m * n / 8; // right ones are turned
  if (engine == kVnniEngine) return 2000 + panels + m * std::ceil(n / 16) * 8 * steps;
  return 10000 + panels + std::ceil(m / 16) * std::ceil(n / 16) * 22 * (steps + 3);
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
  if (engine == kAmxEngine) return bits::multiply_panels<bits::AmxPanels>(products, consumers, threads);
  if (engine == kVnniEngine) return bits::multiply_panels<bits::VnniPanels>(products, consumers, threads);
  if (engine == kPopcountEngine)
    return multiply_words(products, &popcount512::bit_dots, popcount512::kAcross, consumers, threads);
  if (level >= kAvx512) return multiply_words(products, &avx512::bit_dots, avx512::kAcross, consumers, threads);
  if (level >= kAvx2) return multiply_words(products, &avx2::bit_dots, avx2::kAcross, consumers, threads);
#endif
  multiply_words(products, &scalar::bit_dots, scalar::kAcross, consumers, threads);
}

} // namespace fastloss
