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

// bf16, or int8 with sums in int32.
template <bool INT8> struct TileUnit {
  static constexpr int64_t kPerUnit = INT8 ? 4 : 2;
  static constexpr bool kIntegers = INT8;
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
    for (int64_t step = 0; step < steps; ++step, left += kBlock, right += kBlock) {
      _tile_loadd(6, right, kWideRow);
      _tile_loadd(7, right + 16, kWideRow);
      for (int part = 0; part < parts; ++part) {
        const uint32_t *rows = left + part * kPart;
        _tile_loadd(4, rows, kLeftRow);
        _tile_loadd(5, rows + 16 * kStepUnits, kLeftRow);
        if constexpr (INT8) {
          _tile_dpbssd(0, 4, 6);
          _tile_dpbssd(1, 4, 7);
          _tile_dpbssd(2, 5, 6);
          _tile_dpbssd(3, 5, 7);
        } else {
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
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
