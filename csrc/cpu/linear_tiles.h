// Matrix products for linear cross entropy, on operands packed in blocks of 2 KB so that three engines (AMX, AVX-512
// with and without bf16) share every layout and all the packing.
//
// A unit is 32 bits of the reduction: two neighbouring bf16, or one fp32. A step is 16 units.
//   left operand    [step][32 rows][16 units]     a row of a step is one cache line
//   right operand   [step][16 units][32 lanes]
//   product         [32 rows][32 lanes] fp32
// An engine is `multiply(left, right, steps, product, accumulate)` and the few words that depend on its element.
#pragma once
#include "simd.h"

#ifdef __x86_64__

// One target for all engines but AMX: only intrinsics make bf16 instructions, and the fp32 engine has none of those.
#define FASTLOSS_AVX512_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"
#define FASTLOSS_AVX512 __attribute__((target(FASTLOSS_AVX512_TARGET)))
#define FASTLOSS_AVX512_INLINE __attribute__((target(FASTLOSS_AVX512_TARGET), always_inline)) inline

namespace fastloss::linear {

constexpr int64_t kTile = 32;                  // rows of a left, lanes of a right operand
constexpr int64_t kStepUnits = 16;             // units of a step
constexpr int64_t kBlock = kTile * kStepUnits; // units of one step of either operand
constexpr int64_t kProduct = kTile * kTile;    // floats of a product
constexpr int64_t kStepsInCache = 16;          // 32 KB of either operand: the left one stays in the first-level cache

// Of 16 rows of 16 units; without the bf16 instructions, which not every caller has.
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"), always_inline)) inline void
transpose_units(__m512i (&rows)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// kRows rows of the product. The sum starts from zero and is added at the end, so that a long reduction that comes in
// several calls is summed by blocks.
template <class Tiles, int kRows>
FASTLOSS_AVX512_INLINE void multiply_rows(const uint32_t *left, const uint32_t *right, int64_t steps, float *product,
                                          bool accumulate) {
  __m512 sum[kRows][2];
  for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  for (int64_t step = 0; step < steps; ++step, left += kBlock)
    for (int unit = 0; unit < kStepUnits; ++unit, right += kTile) {
      __m512i low = _mm512_loadu_si512(right), high = _mm512_loadu_si512(right + 16);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        __m512i value = _mm512_set1_epi32(int(left[r * kStepUnits + unit]));
        sum[r][0] = Tiles::multiply_add(sum[r][0], value, low);
        sum[r][1] = Tiles::multiply_add(sum[r][1], value, high);
      }
    }
  for (int r = 0; r < kRows; ++r)
    for (int half = 0; half < 2; ++half) {
      float *to = product + r * kTile + half * 16;
      _mm512_storeu_ps(to, accumulate ? _mm512_add_ps(sum[r][half], _mm512_loadu_ps(to)) : sum[r][half]);
    }
}

// 24 accumulators of the 32 registers are the best shape; 12 + 12 + 8 rows make a tile.
template <class Tiles>
FASTLOSS_AVX512 void multiply_tile(const uint32_t *left, const uint32_t *right, int64_t steps, float *product,
                                   bool accumulate) {
  multiply_rows<Tiles, 12>(left, right, steps, product, accumulate);
  multiply_rows<Tiles, 12>(left + 12 * kStepUnits, right, steps, product + 12 * kTile, accumulate);
  multiply_rows<Tiles, 8>(left + 24 * kStepUnits, right, steps, product + 24 * kTile, accumulate);
}

// What an engine may do while it multiplies, two rows at a time: here, fetch the sums that the next call adds to.
struct FetchProduct {
  const float *product;
  int64_t next = 0;
  FASTLOSS_AVX512_INLINE bool pending() const { return next < kTile; }
  FASTLOSS_AVX512_INLINE void two_rows() {
    for (int line = 0; line < 4; ++line)
      _mm_prefetch(reinterpret_cast<const char *>(product + next * kTile + line * 16), _MM_HINT_T0);
    next += 2;
  }
};

struct Fp32Tiles {
  typedef float Element;
  static constexpr int64_t kPerUnit = 1;
  static constexpr bool kFast = false;
  static void begin() {}
  static void end() {}
  static FASTLOSS_AVX512_INLINE __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
  template <class Work>
  static FASTLOSS_AVX512_INLINE void multiply(const uint32_t *left, const uint32_t *right, int64_t steps,
                                              float *product, bool accumulate, Work &work) {
    while (work.pending()) work.two_rows();
    multiply_tile<Fp32Tiles>(left, right, steps, product, accumulate);
  }
  // 16 units of a row, of which `count` elements exist; the others are zero.
  template <class T> static FASTLOSS_AVX512_INLINE __m512i load_units(const T *row, int64_t count) {
    __m512 values = count >= 16 ? avx512::load(row)
                    : count > 0 ? avx512::load_part(row, count, 0.f)
                                : _mm512_setzero_ps();
    return _mm512_castps_si512(values);
  }
  // Rows r and r + 1 (each 32 lanes) into a left operand whose reduction runs along the lanes.
  static FASTLOSS_AVX512_INLINE void store_left(uint32_t *block, int64_t r, const __m512 (&rows)[2][2]) {
    for (int i = 0; i < 2; ++i)
      for (int half = 0; half < 2; ++half)
        _mm512_storeu_ps(block + half * kBlock + (r + i) * kStepUnits, rows[i][half]);
  }
  // The same rows into a right operand whose reduction runs along the rows; `units` is where row 0 begins.
  static FASTLOSS_AVX512_INLINE void store_right(uint32_t *units, int64_t r, const __m512 (&rows)[2][2]) {
    for (int i = 0; i < 2; ++i)
      for (int half = 0; half < 2; ++half) _mm512_storeu_ps(units + (r + i) * kTile + half * 16, rows[i][half]);
  }
  // 32 rows x 32 columns: two steps of a left operand, to two steps of its transpose, `stride` units apart.
  static FASTLOSS_AVX512_INLINE void transpose(const uint32_t *from, uint32_t *to) {
    for (int quadrant = 0; quadrant < 4; ++quadrant) {
      int low = quadrant & 1, high = quadrant >> 1;
      __m512i rows[16];
      for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(from + low * kBlock + (high * 16 + i) * kStepUnits);
      transpose_units(rows);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + high * kBlock + (low * 16 + i) * kStepUnits, rows[i]);
    }
  }
  // sum over lanes of factor * row, row r of a panel of a left operand
  static FASTLOSS_AVX512_INLINE __m512 weighted(const uint32_t *block, int64_t r, const float *factor, __m512 sum) {
    for (int half = 0; half < 2; ++half)
      sum = _mm512_fmadd_ps(_mm512_loadu_ps(block + half * kBlock + r * kStepUnits),
                            _mm512_loadu_ps(factor + half * 16), sum);
    return sum;
  }
};

// 16-bit elements 0 16 1 17 2 18 ...
struct Interleave {
  alignas(64) uint16_t index[32];
  constexpr Interleave() : index() {
    for (int i = 0; i < 32; ++i) index[i] = uint16_t(i / 2 + i % 2 * 16);
  }
};
constexpr Interleave kInterleave;

struct Bf16Tiles {
  typedef BFloat16 Element;
  static constexpr int64_t kPerUnit = 2;
  static constexpr bool kFast = false;
  static void begin() {}
  static void end() {}
  static FASTLOSS_AVX512_INLINE __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  template <class Work>
  static FASTLOSS_AVX512_INLINE void multiply(const uint32_t *left, const uint32_t *right, int64_t steps,
                                              float *product, bool accumulate, Work &work) {
    while (work.pending()) work.two_rows();
    multiply_tile<Bf16Tiles>(left, right, steps, product, accumulate);
  }
  static FASTLOSS_AVX512_INLINE __m512i load_units(const BFloat16 *row, int64_t count) {
    if (count >= 32) return _mm512_loadu_si512(row);
    return count > 0 ? _mm512_maskz_loadu_epi16((__mmask32(1) << count) - 1, row) : _mm512_setzero_si512();
  }
  static FASTLOSS_AVX512_INLINE __m512i round(const __m512 (&row)[2]) {
    return (__m512i)_mm512_cvtne2ps_pbh(row[1], row[0]);
  }
  static FASTLOSS_AVX512_INLINE void store_left(uint32_t *block, int64_t r, const __m512 (&rows)[2][2]) {
    for (int i = 0; i < 2; ++i) _mm512_storeu_si512(block + (r + i) * kStepUnits, round(rows[i]));
  }
  // A unit holds one lane of two rows: the first in its low half.
  static FASTLOSS_AVX512_INLINE void store_right(uint32_t *units, int64_t r, const __m512 (&rows)[2][2]) {
    const __m512i order = _mm512_load_si512(kInterleave.index);
    for (int half = 0; half < 2; ++half) {
      __m512i both = (__m512i)_mm512_cvtne2ps_pbh(rows[1][half], rows[0][half]);
      _mm512_storeu_si512(units + r / 2 * kTile + half * 16, _mm512_permutexvar_epi16(order, both));
    }
  }
  static FASTLOSS_AVX512_INLINE void transpose(const uint32_t *from, uint32_t *to) {
    for (int high = 0; high < 2; ++high) {
      __m512i rows[16];
      for (int i = 0; i < 16; ++i) {
        __m512i even = _mm512_loadu_si512(from + 2 * i * kStepUnits);
        __m512i odd = _mm512_loadu_si512(from + (2 * i + 1) * kStepUnits);
        rows[i] = high ? _mm512_unpackhi_epi16(even, odd) : _mm512_unpacklo_epi16(even, odd);
      }
      transpose_units(rows);
      // The unpacking took four columns of every eight.
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (i / 4 * 8 + i % 4 + high * 4) * kStepUnits, rows[i]);
    }
  }
  static FASTLOSS_AVX512_INLINE __m512 weighted(const uint32_t *block, int64_t r, const float *factor, __m512 sum) {
    const BFloat16 *row = reinterpret_cast<const BFloat16 *>(block + r * kStepUnits);
    sum = _mm512_fmadd_ps(avx512::load(row), _mm512_loadu_ps(factor), sum);
    return _mm512_fmadd_ps(avx512::load(row + 16), _mm512_loadu_ps(factor + 16), sum);
  }
};

} // namespace fastloss::linear

#endif
