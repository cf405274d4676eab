// Packed bits and rows of x -> operands of the engines of linear_tiles.h.
//
// A reduction may run in any order that both operands share. A unit of bf16 holds columns u and 16 + u of 32, a unit of
// int8 columns u, 8 + u, 16 + u and 24 + u: then the bits of a unit's parts lie at the same place of each half or byte
// of a word, and one shift serves them all.
#pragma once
#include "linear_packing.h"
#include "lowbit_matmul_problem.h"

#ifdef __x86_64__

namespace fastloss::lowbit {

using linear::kBlock, linear::kStepUnits, linear::kTile;

// The 16 numbers that codes stand for, as the table of `decode`.
template <class Tiles> FASTLOSS_AVX512 __m512i table_of(const Problem &p) {
  alignas(64) uint8_t bytes[64];
  for (int i = 0; i < 64; ++i) {
    if constexpr (Tiles::kPerUnit == 4) {
      bytes[i] = uint8_t(int8_t(p.values[i % kCodes]));
    } else if constexpr (Tiles::kPerUnit == 2) {
      BFloat16 value;
      from_float(value, p.values[i / 2 % kCodes]);
      memcpy(bytes + i / 2 * 2, &value, sizeof value);
    } else {
      memcpy(bytes + i / 4 * 4, &p.values[i / 4], sizeof(float));
    }
  }
  return _mm512_load_si512(bytes);
}

// The lowest four bits of every element -> its number.
template <class Tiles> FASTLOSS_AVX512_INLINE __m512i decode(__m512i table, __m512i codes) {
  if constexpr (Tiles::kPerUnit == 1) return _mm512_permutexvar_epi32(codes, table);
  else if constexpr (Tiles::kPerUnit == 2) return _mm512_permutexvar_epi16(codes, table);
  else return _mm512_shuffle_epi8(table, _mm512_and_si512(codes, _mm512_set1_epi32(0x0f0f0f0f)));
}

// 16 outputs x 512 columns of one plane: word j of each output in vector j.
FASTLOSS_AVX512_INLINE void load_words(const Problem &p, int plane, int64_t output, int64_t chunk,
                                       __m512i (&words)[16]) {
  const uint8_t *row = p.row(plane, output) + chunk * kRowBytes;
  for (int64_t i = 0; i < 16; ++i)
    words[i] = output + i < p.n ? _mm512_loadu_si512(row + i * p.line) : _mm512_setzero_si512();
  linear::transpose_units(words);
}

// 32 outputs x 512 columns -> right operand. What lies beyond the last column gets a number, for a left operand of 0.
template <class Tiles, int PLANES>
FASTLOSS_AVX512 void unpack_planes(const Problem &p, int64_t output, int64_t chunk, __m512i table, uint32_t *to) {
  constexpr int64_t kUnits = 32 / Tiles::kPerUnit; // of a word
  const __m512i lowest = _mm512_set1_epi32(0x11111111);
  const int64_t words = (std::min(kChunk, p.length - chunk * kChunk) + 63) / 64 * 2;
  for (int half = 0; half < 2; ++half) {
    __m512i lines[PLANES][16];
    for (int plane = 0; plane < PLANES; ++plane) load_words(p, plane, output + half * 16, chunk, lines[plane]);
    uint32_t *unit = to + half * 16;
    for (int64_t j = 0; j < words; ++j, unit += kUnits * kTile) {
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) {
        __m512i codes = _mm512_and_si512(_mm512_srli_epi32(lines[0][j], s), lowest);
#pragma GCC unroll 4
        for (int plane = 1; plane < PLANES; ++plane) {
          __m512i bits = _mm512_and_si512(_mm512_srli_epi32(lines[plane][j], s), lowest);
          codes = _mm512_or_si512(codes, _mm512_slli_epi32(bits, plane));
        }
#pragma GCC unroll 8
        for (int t = 0; t < kUnits / 4; ++t)
          _mm512_storeu_si512(unit + (4 * t + s) * kTile, decode<Tiles>(table, _mm512_srli_epi32(codes, 4 * t)));
      }
    }
  }
}

template <class Tiles>
FASTLOSS_AVX512 void unpack_right(const Problem &p, int64_t output, int64_t chunk, __m512i table, uint32_t *to) {
  switch (p.planes()) {
  case 1:
    return unpack_planes<Tiles, 1>(p, output, chunk, table, to);
  case 2:
    return unpack_planes<Tiles, 2>(p, output, chunk, table, to);
  case 3:
    return unpack_planes<Tiles, 3>(p, output, chunk, table, to);
  default:
    return unpack_planes<Tiles, 4>(p, output, chunk, table, to);
  }
}

template <class T> FASTLOSS_AVX512_INLINE __m512 load_numbers(const T *p, int64_t count) {
  return count > 0 ? linear::load_some(p, count) : _mm512_setzero_ps();
}
FASTLOSS_AVX512_INLINE __m512 load_numbers(const int8_t *p, int64_t count) {
  const __mmask16 mask = count >= 16 ? 0xffff : count > 0 ? avx512::first(count) : 0;
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, p)));
}

// 16 columns of a row of x, times their factor; zero beyond the last one.
template <class T> FASTLOSS_AVX512_INLINE __m512 load_columns(const Problem &p, const T *row, int64_t column) {
  const int64_t count = p.length - column;
  __m512 x = load_numbers(row + column, count);
  return p.factor ? _mm512_mul_ps(x, load_numbers(p.factor + column, count)) : x;
}

// The first 8 bits of each fraction as bf16 in the upper half of a lane; what is left of x goes on to the next part, so
// that three parts hold all of a float. An infinity leaves nothing, and a NaN stays one.
FASTLOSS_AVX512_INLINE __m512i take_part(__m512 &x) {
  const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
  constexpr int kNan = 0x81, kInfinite = 0x18;
  __m512i part = _mm512_and_si512(_mm512_castps_si512(x), upper);
  part = _mm512_mask_mov_epi32(part, _mm512_fpclass_ps_mask(x, kNan), _mm512_set1_epi32(0x7fc00000));
  x = _mm512_maskz_sub_ps(~_mm512_fpclass_ps_mask(x, kNan | kInfinite), x, _mm512_castsi512_ps(part));
  return part;
}

// A line of 64 int8 in the order of their units.
FASTLOSS_AVX512_INLINE void store_bytes(const int8_t *line, uint32_t *to) {
  for (int half = 0; half < 2; ++half) {
    __m128i part[4];
    for (int b = 0; b < 4; ++b) part[b] = _mm_loadl_epi64((const __m128i *)(line + half * 32 + b * 8));
    __m128i low = _mm_unpacklo_epi8(part[0], part[1]), high = _mm_unpacklo_epi8(part[2], part[3]);
    _mm_storeu_si128((__m128i *)(to + half * 8), _mm_unpacklo_epi16(low, high));
    _mm_storeu_si128((__m128i *)(to + half * 8 + 4), _mm_unpackhi_epi16(low, high));
  }
}

// Units of one operand of a panel and a chunk; the parts of x follow each other.
template <class Tiles> constexpr int64_t kOperand = kChunk / Tiles::kPerUnit * kTile;

// 32 rows x 512 columns of x -> left operands [part][step][32 rows][16 units].
template <class Tiles, class T>
FASTLOSS_AVX512 void pack_rows(const Problem &p, const T *x, int64_t row, int64_t chunk, int parts, uint32_t *to) {
  constexpr int64_t kColumns = kStepUnits * Tiles::kPerUnit; // of a step
  const int64_t first = chunk * kChunk, steps = (std::min(kChunk, p.length - first) + kColumns - 1) / kColumns;
  for (int64_t r = 0; r < kTile; ++r) {
    const T *from = x + (row + r) * p.args.ldx;
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t column = first + step * kColumns;
      uint32_t *units = to + step * kBlock + r * kStepUnits;
      if (row + r >= p.args.m) {
        for (int part = 0; part < parts; ++part)
          _mm512_storeu_si512(units + part * kOperand<Tiles>, _mm512_setzero_si512());
      } else if constexpr (Tiles::kPerUnit == 4) {
        alignas(64) int8_t line[64];
        const int64_t count = p.length - column;
        __m512i bytes = _mm512_maskz_loadu_epi8(count >= 64 ? ~0ull : (1ull << count) - 1, from + column);
        _mm512_store_si512(line, _mm512_add_epi8(bytes, _mm512_set1_epi8(char(Tiles::kAdded))));
        store_bytes(line, units);
      } else if constexpr (Tiles::kPerUnit == 2) {
        __m512 low = load_columns(p, from, column), high = load_columns(p, from, column + 16);
        for (int part = 0; part < parts; ++part) {
          __m512i a = _mm512_srli_epi32(take_part(low), 16), b = take_part(high);
          _mm512_storeu_si512(units + part * kOperand<Tiles>, _mm512_or_si512(a, b));
        }
      } else {
        _mm512_storeu_ps(units, load_columns(p, from, column));
      }
    }
  }
}

template <class Tiles>
FASTLOSS_AVX512 void pack_left(const Problem &p, int64_t row, int64_t chunk, int parts, uint32_t *to) {
  const void *x = p.args.x;
  if constexpr (Tiles::kPerUnit == 4) pack_rows<Tiles>(p, static_cast<const int8_t *>(x), row, chunk, parts, to);
  else if (p.integer()) pack_rows<Tiles>(p, static_cast<const int8_t *>(x), row, chunk, parts, to);
  else if (p.args.x_dtype == kFloat32) pack_rows<Tiles>(p, static_cast<const float *>(x), row, chunk, parts, to);
  else if (p.args.x_dtype == kFloat16) pack_rows<Tiles>(p, static_cast<const Float16 *>(x), row, chunk, parts, to);
  else pack_rows<Tiles>(p, static_cast<const BFloat16 *>(x), row, chunk, parts, to);
}

} // namespace fastloss::lowbit

#endif
