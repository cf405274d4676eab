// The engine of tiles (AMX). An operand is steps of 32 numbers, each a tile of 1 KB: of W 16 rows of 32 numbers, as
// they leave the decoder; of x, for 16 of its rows, 16 pairs of numbers of each.
//
// W is decoded a group of columns at a time, 16 rows of it, into the first-level cache: while the vector units fill one
// half of a little room, the tile unit multiplies by what lies in the other. All rows of W that a thread has taken pass
// by some columns of x before the next columns, so that these stay in the second-level cache.
#pragma once
#include "linear_tiles_amx.h"
#include "lossless_linear_groups.h"

#ifdef __x86_64__
#define FASTLOSS_TILES __attribute__((target(FASTLOSS_AVX512_BYTES ",avx512bf16,amx-tile,amx-bf16")))
#define FASTLOSS_TILES_INLINE                                                                                          \
  inline __attribute__((target(FASTLOSS_AVX512_BYTES ",avx512bf16,amx-tile,amx-bf16"), always_inline))

namespace fastloss::avx512vbmi {

constexpr int64_t kTile = 16, kTileNumbers = kTile * 32;
constexpr int64_t kGroupTiles = kQuarters * kTileNumbers; // numbers of 16 rows of a group
constexpr int kMostBlocks = 4;                            // of 16 rows of x, whose sums fill the tiles
constexpr int64_t kGroupsAtOnce = 32;                     // of columns: 512 KB of 64 rows of x

// [blocks of 16 rows][steps][pair][row][2]
FASTLOSS_BF16 static void lay_tiles(const LaidRows &x, int64_t first, int64_t count) {
  const __m512i rows = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i places = _mm512_mullo_epi32(rows, _mm512_set1_epi32(kTile)); // of a row's pairs, in pairs
  for (int64_t block = 0; block < x.stride; block += kTile) {
    uint16_t *laid = static_cast<uint16_t *>(x.laid) + block * x.columns + first * kTile;
    if (block + kTile > x.n) memset(laid, 0, size_t(count * kTile) * sizeof(uint16_t));
    for (int64_t g = 0; g < count; g += kLosslessGroup)
      for (int64_t i = 0; i < std::min(kTile, x.n - block); ++i) {
        Bytes group[kQuarters];
        load_group(x.x + (block + i) * x.columns + first + g, group);
        for (int q = 0; q < kQuarters; ++q)
          _mm512_i32scatter_epi32(laid + g * kTile + q * kTileNumbers + 2 * i, places, group[q], sizeof(uint32_t));
      }
  }
}

// Some groups of 16 rows of W, and how many bytes further those lie that come next.
struct CodedUnit {
  CodedRows rows;
  int64_t first, groups, codes_ahead, low_ahead;
};

// Decodes rows first..first+4 of group `g` and asks memory for what comes next. Rows that there are not are the last
// one once more: they are multiplied, but rows do not mix.
FASTLOSS_TILES_INLINE void decode_rows(const GroupDecoder &decoder, const CodedUnit &w, int64_t g, int first,
                                       uint16_t *tiles) {
  for (int r = first; r < first + 4; ++r) {
    const int row = std::min(r, w.rows.count - 1);
    const uint8_t *codes = w.rows.codes_of(row) + g * kP7GroupBytes, *low = w.rows.low_of(row) + g * kLosslessGroup;
    _mm_prefetch(codes + w.codes_ahead, _MM_HINT_T1); // an address that is not mapped does no harm
    _mm_prefetch(low + w.low_ahead, _MM_HINT_T1);
    _mm_prefetch(low + w.low_ahead + 64, _MM_HINT_T1);
    Bytes group[kQuarters];
    decoder.decode(codes, low, group);
    for (int q = 0; q < kQuarters; ++q) _mm512_store_si512(tiles + q * kTileNumbers + r * 32, group[q]);
  }
}

// One step of a group: a tile of W by that of each block of x. A step waits for the sum that it adds to, so one or two
// blocks have four sums too, of every fourth or second step.
template <int blocks, int step>
FASTLOSS_TILES_INLINE void multiply_step(const uint16_t *w, const uint16_t *x, int64_t block) {
  constexpr int kRow = 64; // bytes
  w += step * kTileNumbers, x += step * kTileNumbers;
  _tile_loadd(4, w, kRow);
  _tile_loadd(5, x, kRow);
  if constexpr (blocks == 1) {
    if constexpr (step == 0) _tile_dpbf16ps(0, 4, 5);
    if constexpr (step == 1) _tile_dpbf16ps(1, 4, 5);
    if constexpr (step == 2) _tile_dpbf16ps(2, 4, 5);
    if constexpr (step == 3) _tile_dpbf16ps(3, 4, 5);
    return;
  }
  _tile_loadd(6, x + block, kRow);
  if constexpr (blocks == 2) {
    if constexpr (step % 2 == 0) {
      _tile_dpbf16ps(0, 4, 5);
      _tile_dpbf16ps(1, 4, 6);
    } else {
      _tile_dpbf16ps(2, 4, 5);
      _tile_dpbf16ps(3, 4, 6);
    }
    return;
  }
  _tile_dpbf16ps(0, 4, 5);
  _tile_dpbf16ps(1, 4, 6);
  _tile_loadd(7, x + 2 * block, kRow);
  _tile_dpbf16ps(2, 4, 7);
  if constexpr (blocks == 4) {
    _tile_loadd(5, x + 3 * block, kRow);
    _tile_dpbf16ps(3, 4, 5);
  }
}

// Adds the products with `blocks` blocks of x to the sums, which those of the first groups begin.
template <int blocks>
FASTLOSS_TILES static void multiply_blocks(const CodedUnit &w, const uint16_t *x, uint16_t *room, float *sums,
                                           int64_t stride) {
  const GroupDecoder decoder(w.rows.table);
  const int64_t block = kTile * w.rows.columns, end = w.first + w.groups;
  x += w.first * kGroupTiles;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int first = 0; first < kTile; first += 4) decode_rows(decoder, w, w.first, first, room);
  for (int64_t g = w.first; g < end; ++g, x += kGroupTiles) {
    const uint16_t *now = room + (g - w.first) % 2 * kGroupTiles;
    uint16_t *next = room + (g - w.first + 1) % 2 * kGroupTiles;
    const bool more = g + 1 < end;
    asm volatile("" ::: "memory"); // GCC's tile loads do not say that they read memory
    multiply_step<blocks, 0>(now, x, block);
    if (more) decode_rows(decoder, w, g + 1, 0, next);
    multiply_step<blocks, 1>(now, x, block);
    if (more) decode_rows(decoder, w, g + 1, 4, next);
    multiply_step<blocks, 2>(now, x, block);
    if (more) decode_rows(decoder, w, g + 1, 8, next);
    multiply_step<blocks, 3>(now, x, block);
    if (more) decode_rows(decoder, w, g + 1, 12, next);
  }
  alignas(64) float product[4][kTile][kTile]; // [sum][row of W][row of x]
  _tile_stored(0, product[0], 64);
  _tile_stored(1, product[1], 64);
  _tile_stored(2, product[2], 64);
  _tile_stored(3, product[3], 64);
  asm volatile("" ::"r"(product) : "memory");
  for (int r = 0; r < kTile; ++r)
    for (int b = 0; b < blocks; ++b) {
      float *to = sums + r * stride + b * kTile;
      __m512 sum = _mm512_load_ps(product[b][r]);
      if constexpr (blocks <= 2)
        for (int t = b + blocks; t < 4; t += blocks) sum = _mm512_add_ps(sum, _mm512_load_ps(product[t][r]));
      _mm512_store_ps(to, w.first ? _mm512_add_ps(_mm512_load_ps(to), sum) : sum);
    }
}

inline void multiply_tiles(const CodedRows &w, const LaidRows &x, uint8_t *room, float *sums) {
  uint16_t *tiles = reinterpret_cast<uint16_t *>(room);
  const int64_t groups = w.columns / kLosslessGroup;
  for (int64_t first = 0; first < groups; first += kGroupsAtOnce)
    for (int row = 0; row < w.count; row += kTile) {
      CodedRows rows = w;
      rows.codes = w.codes_of(row), rows.low = w.low_of(row), rows.count = std::min(int(kTile), w.count - row);
      // Behind the last rows come the first ones, with the groups that follow; behind the last groups other rows.
      const bool last_rows = row + kTile >= w.count, last_groups = first + kGroupsAtOnce >= groups;
      const int64_t rows_ahead = last_rows && !last_groups ? -row : kTile;
      const int64_t groups_ahead = !last_rows ? 0 : last_groups ? -first : kGroupsAtOnce;
      const CodedUnit unit = {rows, first, std::min(kGroupsAtOnce, groups - first),
                              rows_ahead * w.code_step() + groups_ahead * kP7GroupBytes,
                              rows_ahead * w.low_step + groups_ahead * kLosslessGroup};
      for (int64_t i = 0; i < x.stride; i += kMostBlocks * kTile) {
        const uint16_t *laid = static_cast<const uint16_t *>(x.laid) + i * x.columns;
        const int64_t blocks = (x.stride - i) / kTile;
        float *to = sums + row * x.stride + i;
        if (blocks >= 4) multiply_blocks<4>(unit, laid, tiles, to, x.stride);
        else if (blocks == 3) multiply_blocks<3>(unit, laid, tiles, to, x.stride);
        else if (blocks == 2) multiply_blocks<2>(unit, laid, tiles, to, x.stride);
        else multiply_blocks<1>(unit, laid, tiles, to, x.stride);
      }
    }
}

// LinearEngine::add_pairs: 16 rows of x lie side by side.
FASTLOSS_BF16 static void add_pairs_of_tiles(const LaidRows &x, const EscapedPair *pairs, int count, float *sums) {
  const __m512i upper = _mm512_set1_epi32(int(0xffff0000)); // bf16 is the upper half of fp32
  for (const EscapedPair *pair = pairs; pair < pairs + count; ++pair) {
    const int within = int(pair->column % kLosslessGroup);
    const int64_t place = pair->column - within + place_in_group(within);
    const uint16_t *even = static_cast<const uint16_t *>(x.laid) + place / 2 * 2 * kTile, *odd = even + kTileNumbers;
    const __m512 low = _mm512_set1_ps(pair->low), high = _mm512_set1_ps(pair->high);
    const __m128i up = _mm_cvtsi32_si128(place % 2 ? 0 : 16);
    float *to = sums + pair->sums;
    for (int64_t i = 0; i < x.stride; i += kTile, even += kTile * x.columns, odd += kTile * x.columns) {
      const __m512i first = _mm512_and_si512(_mm512_sll_epi32(_mm512_loadu_si512(even), up), upper);
      const __m512i second = _mm512_and_si512(_mm512_sll_epi32(_mm512_loadu_si512(odd), up), upper);
      const __m512 both = _mm512_add_ps(_mm512_mul_ps(low, _mm512_castsi512_ps(first)),
                                        _mm512_mul_ps(high, _mm512_castsi512_ps(second)));
      _mm512_storeu_ps(to + i, _mm512_add_ps(_mm512_loadu_ps(to + i), both));
    }
  }
}

inline LinearEngine tile_engine() {
  return {kTile,
          sizeof(uint16_t),
          [](int64_t) { return 2 * kGroupTiles * int64_t(sizeof(uint16_t)); },
          linear::AmxTiles::begin,
          linear::AmxTiles::end,
          lay_tiles,
          multiply_tiles,
          add_pairs_of_tiles,
          write_sums};
}

} // namespace fastloss::avx512vbmi

#undef FASTLOSS_TILES
#undef FASTLOSS_TILES_INLINE
#undef FASTLOSS_BF16
#undef FASTLOSS_BF16_INLINE
#endif
