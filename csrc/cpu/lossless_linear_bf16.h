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
    for (int h = 0; h < 2; ++h) { // 16 bits hold the fields, or sign and mantissa, of an even number and its neighbour
      const Bytes both = load_bytes(low + 64 * h);
      w[2 * h] = with_field(_mm512_slli_epi16(fields[h], 7), _mm512_shuffle_epi8(both, even_));
      w[2 * h + 1] = with_field(_mm512_srli_epi16(fields[h], 1), _mm512_shuffle_epi8(both, odd_));
    }
  }

private:
  Bytes table_[4];

  // Sign and mantissa twice each: the sign from the upper byte, the mantissa from the lower one.
  const Bytes even_ = _mm512_set4_epi32(0x0e0e0c0c, 0x0a0a0808, 0x06060404, 0x02020000);
  const Bytes odd_ = _mm512_add_epi8(even_, _mm512_set1_epi8(1));

  // Bits 14 to 7 from `field`, the others from `rest`.
  static FASTLOSS_BF16_INLINE Bytes with_field(Bytes field, Bytes rest) {
    return _mm512_ternarylogic_epi64(field, rest, _mm512_set1_epi16(0x7f80), 0xe4);
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

// Asks for the codes and bytes of the group that is `kAhead` numbers further: the processor's own look ahead ends with
// a page. An address that is not mapped does no harm.
constexpr int64_t kAhead = 2048;
FASTLOSS_BF16_INLINE void look_ahead(const uint8_t *codes, const uint8_t *low) {
  _mm_prefetch(codes + kAhead / kLosslessGroup * kP7GroupBytes, _MM_HINT_T0);
  _mm_prefetch(low + kAhead, _MM_HINT_T0);
  _mm_prefetch(low + kAhead + 64, _MM_HINT_T0);
}

// A row of W by `count` rows of x; a group of numbers does not leave the registers.
template <int count>
FASTLOSS_BF16 static void dots_of_row(const GroupDecoder &decoder, const CodedRows &w, int row, const uint16_t *x,
                                      float *sums) {
  __m512 sum[count][kQuarters] = {};
  const uint8_t *codes = w.codes_of(row), *low = w.low_of(row);
  for (int64_t g = 0; g < w.columns; g += kLosslessGroup, codes += kP7GroupBytes) {
    Bytes group[kQuarters];
    look_ahead(codes, low + g);
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
constexpr int64_t kGroupsAtOnce = 32; // of 16 rows: 128 KB, in the second-level cache

// More than 32 rows of x come in blocks of 64.
constexpr int64_t step_of_tiles(int64_t n) { return n > 2 * kTile ? 4 * kTile : kTile; }

// [blocks of 16 rows][steps][pair][row][2]
inline void lay_tiles(const uint16_t *x, int64_t n, int64_t columns, void *laid) {
  uint16_t *out = static_cast<uint16_t *>(laid);
  const int64_t step = step_of_tiles(n), whole = (n + step - 1) / step * step;
  for (int64_t block = 0; block < whole; block += kTile)
    for (int64_t place = 0; place < columns; place += 2, out += 2 * kTile) {
      const int64_t j = place % kLosslessGroup; // two places of even numbers, or of odd ones, hold j and j + 2
      const int64_t k = place - j + j / 64 * 64 + j % 64 / 32 + j % 32 * 2;
      for (int64_t i = 0; i < kTile; ++i) {
        const bool there = block + i < n;
        out[2 * i] = there ? x[(block + i) * columns + k] : 0;
        out[2 * i + 1] = there ? x[(block + i) * columns + k + 2] : 0;
      }
    }
}

FASTLOSS_BF16 static void decode_tiles(const GroupDecoder &decoder, const CodedRows &w, int64_t first, int64_t groups,
                                       uint16_t *tiles) {
  for (int r = 0; r < w.count; ++r) {
    const uint8_t *codes = w.codes_of(r) + first * kP7GroupBytes, *low = w.low_of(r) + first * kLosslessGroup;
    for (int64_t g = 0; g < groups; ++g) {
      Bytes group[kQuarters];
      look_ahead(codes + g * kP7GroupBytes, low + g * kLosslessGroup);
      decoder.decode(codes + g * kP7GroupBytes, low + g * kLosslessGroup, group);
      for (int q = 0; q < kQuarters; ++q)
        _mm512_storeu_si512(tiles + ((g * kStepsOfGroup + q) * kTile + r) * 32, group[q]);
    }
  }
}

// A step waits for the sum that it adds to, so one or two blocks of 16 rows of x have four sums too, of every fourth or
// second step. Rows of W are not mixed: those that there are not do not matter.
template <int blocks>
__attribute__((target(FASTLOSS_AVX512_BYTES ",avx512bf16,amx-tile,amx-bf16"))) static void
multiply_tile_blocks(const CodedRows &w, const uint16_t *x, uint16_t *tiles, float *sums) {
  const GroupDecoder decoder(w.table);
  const int64_t groups = w.columns / kLosslessGroup, block = kTile * w.columns;
  constexpr int kRow = 64, kSums = 4, kApart = kSums / blocks; // kRow: bytes
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t first = 0; first < groups; first += kGroupsAtOnce) {
    const int64_t some = std::min(kGroupsAtOnce, groups - first);
    decode_tiles(decoder, w, first, some, tiles);
    const uint16_t *left = tiles, *right = x + first * kStepsOfGroup * kTileNumbers;
    asm volatile("" ::: "memory"); // GCC's tile loads do not say that they read memory
    for (int64_t s = 0; s < some * kStepsOfGroup;
         s += kApart, left += kApart * kTileNumbers, right += kApart * kTileNumbers) {
      // Sum t is of step t / blocks, block t % blocks.
      _tile_loadd(4, left, kRow);
      _tile_loadd(6, right, kRow);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kApart == 4) _tile_loadd(5, left + kTileNumbers, kRow);
      _tile_loadd(7, right + (blocks > 1 ? block : kTileNumbers), kRow);
      if constexpr (kApart == 4) _tile_dpbf16ps(1, 5, 7);
      else _tile_dpbf16ps(1, 4, 7);
      if constexpr (kApart > 1) _tile_loadd(4, left + kSums / blocks / 2 * kTileNumbers, kRow);
      _tile_loadd(6, right + (blocks > 2 ? 2 * block : kApart / 2 * kTileNumbers), kRow);
      _tile_dpbf16ps(2, 4, 6);
      if constexpr (kApart == 4) _tile_loadd(5, left + 3 * kTileNumbers, kRow);
      _tile_loadd(7, right + (blocks > 2 ? 3 * block : blocks > 1 ? block + kTileNumbers : 3 * kTileNumbers), kRow);
      if constexpr (kApart == 4) _tile_dpbf16ps(3, 5, 7);
      else _tile_dpbf16ps(3, 4, 7);
    }
  }
  alignas(64) float product[kSums][kTile][kTile]; // [sum][row of W][row of x]
  _tile_stored(0, product[0], kRow);
  _tile_stored(1, product[1], kRow);
  _tile_stored(2, product[2], kRow);
  _tile_stored(3, product[3], kRow);
  asm volatile("" ::"r"(product) : "memory");
  for (int t = 0; t < kSums; ++t)
    for (int i = 0; i < kTile; ++i)
      for (int r = 0; r < kRowsAtOnce; ++r) {
        float &sum = sums[(t % blocks * kTile + i) * kRowsAtOnce + r];
        sum = t < blocks ? product[t][r][i] : sum + product[t][r][i];
      }
}

inline void multiply_tiles(const CodedRows &w, const void *laid, int64_t n, uint8_t *room, float *sums) {
  const uint16_t *x = static_cast<const uint16_t *>(laid);
  uint16_t *tiles = reinterpret_cast<uint16_t *>(room);
  for (int64_t i = 0; i < n; i += 4 * kTile, x += 4 * kTile * w.columns, sums += 4 * kTile * kRowsAtOnce) {
    const int64_t blocks = (n - i + kTile - 1) / kTile;
    if (blocks > 2) multiply_tile_blocks<4>(w, x, tiles, sums);
    else if (blocks == 2) multiply_tile_blocks<2>(w, x, tiles, sums);
    else multiply_tile_blocks<1>(w, x, tiles, sums);
  }
}

inline LinearEngine tile_engine(int64_t n) {
  return {step_of_tiles(n),
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
