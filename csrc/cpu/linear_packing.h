// From matrices as the caller has them to the operands of linear_tiles.h, and back. Every edge is padded with zeros.
#pragma once
#include <algorithm>

#include "linear_tiles.h"

#ifdef __x86_64__

namespace fastloss::linear {

// Up to 32 rows -> left operand, reduction along the row.
template <class Tiles, class T>
FASTLOSS_AVX512 void pack_left(const T *rows, int64_t stride, int64_t count, int64_t columns, int64_t steps,
                               uint32_t *to) {
  constexpr int64_t kElements = kStepUnits * Tiles::kPerUnit;
  for (int64_t r = 0; r < kTile; ++r)
    for (int64_t step = 0; step < steps; ++step) {
      __m512i units = r < count ? Tiles::load_units(rows + r * stride + step * kElements, columns - step * kElements)
                                : _mm512_setzero_si512();
      _mm512_storeu_si512(to + step * kBlock + r * kStepUnits, units);
    }
}

// Strips of a left operand -> the left operand of its transpose: [strip][step][row] -> [column / 32][row step][column].
template <class Tiles>
FASTLOSS_AVX512 void pack_transposed(const uint32_t *from, int64_t strips, int64_t steps, uint32_t *to) {
  constexpr int64_t kSteps = 2 / Tiles::kPerUnit; // steps of 32 columns
  for (int64_t strip = 0; strip < strips; ++strip)
    for (int64_t j = 0; j < steps / kSteps; ++j)
      Tiles::transpose(from + (strip * steps + j * kSteps) * kBlock, to + (j * strips + strip) * kSteps * kBlock);
}

// 32 rows given by number (-1: none) -> right operand, reduction along the row.
template <class Tiles, class T>
FASTLOSS_AVX512 void pack_right(const T *matrix, int64_t stride, const int64_t *row_of, int64_t columns, int64_t steps,
                                uint32_t *to) {
  constexpr int64_t kElements = kStepUnits * Tiles::kPerUnit;
  for (int64_t step = 0; step < steps; ++step, to += kBlock)
    for (int half = 0; half < 2; ++half) {
      __m512i rows[16];
      for (int i = 0; i < 16; ++i) {
        int64_t row = row_of[half * 16 + i];
        rows[i] = row < 0 ? _mm512_setzero_si512()
                          : Tiles::load_units(matrix + row * stride + step * kElements, columns - step * kElements);
      }
      transpose_units(rows);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * kTile + half * 16, rows[i]);
    }
}

// 32 rows, each times its factor -> right operand, reduction along the rows: panels of 32 columns, `panel` units apart.
template <class Tiles, class T>
FASTLOSS_AVX512 void pack_scaled(const T *matrix, int64_t stride, const int64_t *row_of, const float *factor,
                                 int64_t columns, int64_t panel, uint32_t *to) {
  for (int64_t r = 0; r < kTile; r += 2)
    for (int64_t j = 0; j < columns; j += kTile) {
      __m512 rows[2][2];
      for (int i = 0; i < 2; ++i)
        for (int half = 0; half < 2; ++half) {
          int64_t row = row_of[r + i], column = j + half * 16, count = std::min<int64_t>(columns - column, 16);
          rows[i][half] = row < 0 || count <= 0
                              ? _mm512_setzero_ps()
                              : _mm512_mul_ps(_mm512_set1_ps(factor[r + i]),
                                              avx512::load_part(matrix + row * stride + column, count, 0.f));
        }
      Tiles::store_right(to + j / kTile * panel, r, rows);
    }
}

template <class T> FASTLOSS_AVX512_INLINE __m512 load_some(const T *p, int64_t count) {
  return count >= 16 ? avx512::load(p) : avx512::load_part(p, count, 0.f);
}
template <class T> FASTLOSS_AVX512_INLINE void store_some(T *p, __m512 values, int64_t count) {
  if (count >= 16) avx512::store(p, values);
  else avx512::store_part(p, values, count);
}

template <class A, class B> FASTLOSS_AVX512 float dot(const A *a, const B *b, int64_t count) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t j = 0; j < count; j += 16)
    sum = _mm512_fmadd_ps(load_some(a + j, count - j), load_some(b + j, count - j), sum);
  return _mm512_reduce_add_ps(sum);
}

// to += factor * row
template <class T> FASTLOSS_AVX512 void add_row(float *to, float factor, const T *row, int64_t count) {
  const __m512 f = _mm512_set1_ps(factor);
  for (int64_t j = 0; j < count; j += 16)
    store_some(to + j, _mm512_fmadd_ps(f, load_some(row + j, count - j), load_some(to + j, count - j)), count - j);
}

} // namespace fastloss::linear

#endif
