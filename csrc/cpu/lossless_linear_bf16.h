// The bf16 engines of lossless_linear.cpp: dot products (AVX-512 bf16) for a few rows of x, tiles (AMX) for more. Both
// multiply a group's 128 numbers in the order in which they leave the decoder without a shuffle: of its first 64 those
// at even places, those at odd ones, then of the other 64; x is laid out in that order once.
#pragma once
#include "linear_tiles_amx.h"
#include "lossless_linear_rows.h"

#ifdef __x86_64__
#define FASTLOSS_BF16 __attribute__((target(FASTLOSS_AVX512_BYTES ",avx512bf16")))
#define FASTLOSS_BF16_INLINE inline __attribute__((target(FASTLOSS_AVX512_BYTES ",avx512bf16"), always_inline))

namespace fastloss::avx512vbmi {

constexpr int kQuarters = 4; // of a group, 32 numbers each

// Where number `j` of a group goes.
constexpr int place_in_group(int j) { return j / 64 * 64 + j % 2 * 32 + j % 64 / 2; }

// A group of numbers as four vectors of bf16.
class GroupDecoder {
public:
  FASTLOSS_BF16_INLINE explicit GroupDecoder(const uint8_t *table) {
    for (int i = 0; i < 4; ++i) table_[i] = load_bytes(table + 64 * i);
  }
  FASTLOSS_BF16_INLINE void decode(const uint8_t *codes, const uint8_t *low, Bytes (&w)[kQuarters]) const {
    const Bytes shifts = _mm512_set1_epi64(0x312a231c150e0700); // as p7_fields
    const Bytes code =
        _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(load_bytes(kSevens), load_bytes(codes)));
    Bytes fields[2];
    interleave(_mm512_permutex2var_epi8(table_[0], code, table_[1]),
               _mm512_permutex2var_epi8(table_[2], code, table_[3]), fields[0], fields[1]);
    const Bytes field = _mm512_set1_epi16(0x7f80), sign = _mm512_set1_epi16(int16_t(0x8000));
    for (int h = 0; h < 2; ++h) { // 16 bits hold the fields, or sign and mantissa, of an even number and its neighbour
      const Bytes both = load_bytes(low + 64 * h);
      const Bytes even = choose(sign, _mm512_slli_epi16(both, 8), both);
      const Bytes odd = choose(sign, both, _mm512_srli_epi16(both, 8));
      w[2 * h] = choose(field, _mm512_slli_epi16(fields[h], 7), even);
      w[2 * h + 1] = choose(field, _mm512_srli_epi16(fields[h], 1), odd);
    }
  }

private:
  Bytes table_[4];

  // The bits of `yes` where the mask has ones, else those of `no`.
  static FASTLOSS_BF16_INLINE Bytes choose(Bytes mask, Bytes yes, Bytes no) {
    return _mm512_ternarylogic_epi64(mask, yes, no, 0xca);
  }
};

FASTLOSS_BF16_INLINE __m512 add_dots(__m512 sum, Bytes a, Bytes b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// [n][columns]
inline void lay_dots(const uint16_t *x, int64_t n, int64_t columns, void *laid) {
  uint16_t *out = static_cast<uint16_t *>(laid);
  for (int64_t g = 0; g < n * columns; g += kLosslessGroup)
    for (int j = 0; j < kLosslessGroup; ++j) out[g + place_in_group(j)] = x[g + j];
}

// A row of W by `count` rows of x; a group of numbers does not leave the registers.
template <int count>
FASTLOSS_BF16 static void dots_of_row(const GroupDecoder &decoder, const CodedRows &w, int row, const uint16_t *x,
                                      float *sums) {
  __m512 sum[count][kQuarters] = {};
  const uint8_t *codes = w.codes_of(row), *low = w.low_of(row);
  for (int64_t g = 0; g < w.columns; g += kLosslessGroup, codes += kP7GroupBytes) {
    Bytes group[kQuarters];
    decoder.decode(codes, low + g, group);
    for (int i = 0; i < count; ++i)
      for (int q = 0; q < kQuarters; ++q)
        sum[i][q] = add_dots(sum[i][q], group[q], _mm512_loadu_si512(x + i * w.columns + g + 32 * q));
  }
  for (int i = 0; i < count; ++i)
    sums[i * kRowsAtOnce + row] =
        _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[i][0], sum[i][1]), _mm512_add_ps(sum[i][2], sum[i][3])));
}

// Sums of more than four rows of x do not fit the registers: W is decoded again, from the first-level cache.
FASTLOSS_BF16 static void multiply_dots(const CodedRows &w, const void *laid, int64_t n, uint8_t *, float *sums) {
  const uint16_t *x = static_cast<const uint16_t *>(laid);
  const GroupDecoder decoder(w.table);
  for (int r = 0; r < w.count; ++r)
    for (int64_t i = 0; i < n; i += 4) {
      const uint16_t *rows = x + i * w.columns;
      float *to = sums + i * kRowsAtOnce;
      if (n - i >= 4) dots_of_row<4>(decoder, w, r, rows, to);
      else if (n - i == 3) dots_of_row<3>(decoder, w, r, rows, to);
      else if (n - i == 2) dots_of_row<2>(decoder, w, r, rows, to);
      else dots_of_row<1>(decoder, w, r, rows, to);
    }
}

inline LinearEngine dot_engine() {
  return {1, sizeof(uint16_t), [](int64_t) { return int64_t(0); }, [] {}, [] {}, lay_dots, multiply_dots};
}

// ---- Tiles. An operand is steps of 32 numbers, each a tile of 1 KB: of W 16 rows of 32 numbers; of x, for 16 of its
// rows, 16 pairs of numbers of each.
constexpr int64_t kTile = 16, kTileNumbers = kTile * 32, kStepsOfGroup = kQuarters;
constexpr int64_t kGroupsAtOnce = 8; // of 16 rows: 32 KB

// [blocks of 16 rows][steps][pair][row][2]
inline void lay_tiles(const uint16_t *x, int64_t n, int64_t columns, void *laid) {
  uint16_t *out = static_cast<uint16_t *>(laid);
  memset(out, 0, size_t((n + kTile - 1) / kTile * kTile * columns) * sizeof *out);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < columns; ++k) {
      const int64_t place = k / kLosslessGroup * kLosslessGroup + place_in_group(int(k % kLosslessGroup));
      const int64_t step = place / 32, pair = place % 32 / 2;
      out[i / kTile * kTile * columns + step * kTileNumbers + (pair * kTile + i % kTile) * 2 + place % 2] =
          x[i * columns + k];
    }
}

FASTLOSS_BF16 static void decode_tiles(const GroupDecoder &decoder, const CodedRows &w, int64_t first, int64_t groups,
                                       uint16_t *tiles) {
  for (int r = 0; r < w.count; ++r) {
    const uint8_t *codes = w.codes_of(r) + first * kP7GroupBytes, *low = w.low_of(r) + first * kLosslessGroup;
    for (int64_t g = 0; g < groups; ++g) {
      Bytes group[kQuarters];
      decoder.decode(codes + g * kP7GroupBytes, low + g * kLosslessGroup, group);
      for (int q = 0; q < kQuarters; ++q)
        _mm512_storeu_si512(tiles + ((g * kStepsOfGroup + q) * kTile + r) * 32, group[q]);
    }
  }
}

// Sums of `blocks` blocks of 16 rows of x stay in tiles; rows of W are not mixed, so those that there are not do not
// matter.
template <int blocks>
__attribute__((target(FASTLOSS_AVX512_BYTES ",avx512bf16,amx-tile,amx-bf16"))) static void
multiply_tile_blocks(const CodedRows &w, const uint16_t *x, uint16_t *tiles, float *sums) {
  const GroupDecoder decoder(w.table);
  const int64_t groups = w.columns / kLosslessGroup;
  constexpr int kRow = 64; // bytes
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t first = 0; first < groups; first += kGroupsAtOnce) {
    const int64_t some = std::min(kGroupsAtOnce, groups - first);
    decode_tiles(decoder, w, first, some, tiles);
    const uint16_t *right = x + first * kStepsOfGroup * kTileNumbers;
    asm volatile("" ::: "memory"); // GCC's tile loads do not say that they read memory
    for (int64_t s = 0; s < some * kStepsOfGroup; ++s, right += kTileNumbers) {
      _tile_loadd(4, tiles + s * kTileNumbers, kRow);
      _tile_loadd(5, right, kRow);
      _tile_dpbf16ps(0, 4, 5);
      if constexpr (blocks > 1) {
        _tile_loadd(6, right + kTile * w.columns, kRow);
        _tile_dpbf16ps(1, 4, 6);
      }
      if constexpr (blocks > 2) {
        _tile_loadd(5, right + 2 * kTile * w.columns, kRow);
        _tile_dpbf16ps(2, 4, 5);
      }
      if constexpr (blocks > 3) {
        _tile_loadd(6, right + 3 * kTile * w.columns, kRow);
        _tile_dpbf16ps(3, 4, 6);
      }
    }
  }
  alignas(64) float product[4][kTile][kTile]; // [block][row of W][row of x]
  _tile_stored(0, product[0], kRow);
  _tile_stored(1, product[1], kRow);
  _tile_stored(2, product[2], kRow);
  _tile_stored(3, product[3], kRow);
  asm volatile("" ::"r"(product) : "memory");
  for (int b = 0; b < blocks; ++b)
    for (int i = 0; i < kTile; ++i)
      for (int r = 0; r < kRowsAtOnce; ++r) sums[(b * kTile + i) * kRowsAtOnce + r] = product[b][r][i];
}

inline void multiply_tiles(const CodedRows &w, const void *laid, int64_t n, uint8_t *room, float *sums) {
  const uint16_t *x = static_cast<const uint16_t *>(laid);
  uint16_t *tiles = reinterpret_cast<uint16_t *>(room);
  for (int64_t i = 0; i < n; i += 4 * kTile, x += 4 * kTile * w.columns, sums += 4 * kTile * kRowsAtOnce) {
    const int64_t blocks = (n - i + kTile - 1) / kTile;
    if (blocks >= 4) multiply_tile_blocks<4>(w, x, tiles, sums);
    else if (blocks == 3) multiply_tile_blocks<3>(w, x, tiles, sums);
    else if (blocks == 2) multiply_tile_blocks<2>(w, x, tiles, sums);
    else multiply_tile_blocks<1>(w, x, tiles, sums);
  }
}

inline LinearEngine tile_engine() {
  return {kTile,
          sizeof(uint16_t),
          [](int64_t) { return kGroupsAtOnce * kLosslessGroup * kTile * 2; },
          linear::AmxTiles::begin,
          linear::AmxTiles::end,
          lay_tiles,
          multiply_tiles};
}

} // namespace fastloss::avx512vbmi

#undef FASTLOSS_BF16
#undef FASTLOSS_BF16_INLINE
#endif
