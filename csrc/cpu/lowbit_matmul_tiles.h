// The engines of linear_tiles.h as lowbit_matmul uses them: several left operands, the parts of one x, past one right
// operand.
#pragma once
#include "linear_tiles_amx.h"
#include "lowbit_matmul_operands.h"

#ifdef __x86_64__

#define FASTLOSS_AMX_BOTH __attribute__((target(FASTLOSS_AVX512_TARGET ",amx-tile,amx-bf16,amx-int8"), noinline))

namespace fastloss::lowbit {

inline bool has_amx_int8() {
  constexpr unsigned kInt8Bit = 1u << 25;
  unsigned a, b, c, d;
  return linear::has_amx_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kInt8Bit);
}

// Without tiles there is one part.
template <class Base> struct VectorTiles : Base {
  static constexpr bool kIntegers = false; // whether a product is int32
  static constexpr int kAdded = 0;         // what every int8 of x has more than it should
  static constexpr int64_t kRun = 2;       // steps
  struct NoWork {
    FASTLOSS_AVX512_INLINE bool pending() const { return false; }
    FASTLOSS_AVX512_INLINE void two_rows() {}
  };
  static FASTLOSS_AVX512 void multiply(const uint32_t *left, int, const uint32_t *right, int64_t steps, float *product,
                                       bool accumulate) {
    NoWork none;
    for (int64_t step = 0; step < steps; step += kRun) // sums of sums: a long one would lose digits
      Base::multiply(left + step * kBlock, right + step * kBlock, std::min(kRun, steps - step), product,
                     accumulate || step, none);
  }
};

#define FASTLOSS_VNNI __attribute__((target(FASTLOSS_AVX512_TARGET ",avx512vnni")))

// int8 without tiles: x is made unsigned by adding 128, which the sums of the numbers take off again.
struct VnniTiles {
  static constexpr int64_t kPerUnit = 4;
  static constexpr bool kIntegers = true;
  static constexpr int kAdded = 128;
  static void begin() {}
  static void end() {}

  static FASTLOSS_VNNI void multiply(const uint32_t *left, int, const uint32_t *right, int64_t steps, float *product,
                                     bool) {
    for (int r = 0; r < kTile; r += 8) multiply_rows(left + r * kStepUnits, right, steps, product + r * kTile);
  }

  // The sum of each lane's numbers.
  static FASTLOSS_VNNI void add_numbers(const uint32_t *right, int64_t steps, __m512i (&sums)[2]) {
    sums[0] = sums[1] = _mm512_setzero_si512();
    for (int64_t unit = 0; unit < steps * kStepUnits; ++unit, right += kTile)
      for (int half = 0; half < 2; ++half)
        sums[half] = _mm512_dpbusd_epi32(sums[half], _mm512_set1_epi8(1), _mm512_loadu_si512(right + half * 16));
  }

private:
  static FASTLOSS_VNNI void multiply_rows(const uint32_t *left, const uint32_t *right, int64_t steps, float *product) {
    __m512i sum[8][2];
    for (int r = 0; r < 8; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
    for (int64_t step = 0; step < steps; ++step, left += kBlock)
      for (int unit = 0; unit < kStepUnits; ++unit, right += kTile) {
        __m512i low = _mm512_loadu_si512(right), high = _mm512_loadu_si512(right + 16);
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r) {
          __m512i value = _mm512_set1_epi32(int(left[r * kStepUnits + unit]));
          sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], value, low);
          sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], value, high);
        }
      }
    for (int r = 0; r < 8; ++r)
      for (int half = 0; half < 2; ++half) _mm512_storeu_si512(product + r * kTile + half * 16, sum[r][half]);
  }
};

// bf16, or int8 with sums in int32.
template <bool INT8> struct TileUnit {
  static constexpr int64_t kPerUnit = INT8 ? 4 : 2;
  static constexpr bool kIntegers = INT8;
  static constexpr int kAdded = 0;
  static void begin() { linear::AmxTiles::begin(); }
  static void end() { linear::AmxTiles::end(); }

  static FASTLOSS_AMX_BOTH void multiply(const uint32_t *left, int parts, const uint32_t *right, int64_t steps,
                                         float *product, bool accumulate) {
    constexpr int kLeftRow = 64, kWideRow = 128;
    constexpr int64_t kPart = kChunk / kPerUnit * kTile;
    asm volatile("" ::: "memory"); // GCC's tile loads do not say that they read memory
    if (accumulate) {
      _tile_loadd(0, product, kWideRow);
      _tile_loadd(1, product + 16, kWideRow);
      _tile_loadd(2, product + 16 * kTile, kWideRow);
      _tile_loadd(3, product + 16 * kTile + 16, kWideRow);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int part = parts - 1; part >= 0; --part) // the smallest first, while they are not lost beside the sum
      for (int64_t step = 0; step < steps; ++step) {
        const uint32_t *a = left + part * kPart + step * kBlock, *b = right + step * kBlock;
        _tile_loadd(6, b, kWideRow);
        _tile_loadd(4, a, kLeftRow);
        _tile_loadd(5, a + 16 * kStepUnits, kLeftRow);
        _tile_loadd(7, b + 16, kWideRow);
        if constexpr (INT8) {
          _tile_dpbssd(0, 4, 6);
          _tile_dpbssd(2, 5, 6);
          _tile_dpbssd(1, 4, 7);
          _tile_dpbssd(3, 5, 7);
        } else {
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    _tile_stored(0, product, kWideRow);
    _tile_stored(1, product + 16, kWideRow);
    _tile_stored(2, product + 16 * kTile, kWideRow);
    _tile_stored(3, product + 16 * kTile + 16, kWideRow);
    asm volatile("" ::: "memory");
  }
};

} // namespace fastloss::lowbit

#endif
