// What happens to a product of logits before it leaves the cache: E = 2^(z log2 e - offset of the token), summed over
// the columns, and E rounded into operands of the two products that follow. The target column is left out of
// everything.
#pragma once
#include "linear_tiles.h"

#ifdef __x86_64__

namespace fastloss::linear {

// The state of the tokens of a chunk; each array has one number a token.
struct TokenSums {
  const float *offset;   // in units of log2
  const int32_t *target; // -1: no column is the target
  float *sum;            // of E, over the current block of columns
  float *top;            // largest z log2 e - offset
};

struct LogitMap {
  float log2_scale; // logit -> exponent: scale * log2 e; with a softcap: softcap * log2 e, after the tanh
  float inner;      // scale / softcap, what the logit is multiplied by inside the tanh
  float nothing;    // the infinity that the map takes to z = -inf
};

// Without a softcap the logits that must not count become the infinity whose exponential is 0: no masks in the loop.
FASTLOSS_AVX512_INLINE void hide_targets(float *product, const int32_t *target, int64_t column, float nothing) {
  const __m512i first = _mm512_set1_epi32(int(column)), count = _mm512_set1_epi32(kTile);
  for (int half = 0; half < 2; ++half) {
    __m512i row = _mm512_sub_epi32(_mm512_loadu_si512(target + half * 16), first);
    unsigned hits = _mm512_cmplt_epu32_mask(row, count);
    for (; hits; hits &= hits - 1) {
      int lane = half * 16 + __builtin_ctz(hits);
      product[(target[lane] - column) * kTile + lane] = nothing;
    }
  }
}

// One product on its way: rows are columns first_column.. of the logits, lanes are tokens. Two rows at a time, so that
// the AMX engine can put them between the tile instructions of the next product.
template <class Tiles, bool kSoftcap> struct Exponentials {
  const float *product, *bias;       // `bias` has 32 numbers, those past the last column being LogitMap::nothing
  int64_t first_column, rows, token; // `rows` columns exist; `token` is the first lane's
  uint32_t *left, *right;            // either may be null
  int64_t next = kTile;              // 32: nothing to do
  __m512 scale, inner, offset[2], sum[2], top[2];
  __m512i target[2];

  FASTLOSS_AVX512_INLINE void begin(float *of, const LogitMap &map, const TokenSums &tokens) {
    product = of;
    if (!kSoftcap) hide_targets(of, tokens.target + token, first_column, map.nothing);
    scale = _mm512_set1_ps(map.log2_scale);
    inner = _mm512_set1_ps(map.inner);
    for (int half = 0; half < 2; ++half) {
      offset[half] = _mm512_loadu_ps(tokens.offset + token + half * 16);
      target[half] = _mm512_loadu_si512(tokens.target + token + half * 16);
      top[half] = _mm512_loadu_ps(tokens.top + token + half * 16);
      sum[half] = _mm512_setzero_ps();
    }
    next = 0;
  }

  FASTLOSS_AVX512_INLINE bool pending() const { return next < kTile; }

  FASTLOSS_AVX512_INLINE void two_rows() {
    const int64_t r = next;
    __m512 e[2][2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m512 z = _mm512_add_ps(_mm512_loadu_ps(product + (r + i) * kTile + half * 16), _mm512_set1_ps(bias[r + i]));
        __m512 slope;
        __mmask16 counts;
        if (kSoftcap) {
          z = avx512_common::tanh(_mm512_mul_ps(z, inner));
          slope = _mm512_fnmadd_ps(z, z, _mm512_set1_ps(1.f));
          counts = _mm512_cmpneq_epi32_mask(target[half], _mm512_set1_epi32(int(first_column + r) + i));
          if (r + i >= rows) counts = 0;
        }
        __m512 exponent = _mm512_fmsub_ps(z, scale, offset[half]);
        if (kSoftcap) exponent = _mm512_mask_mov_ps(_mm512_set1_ps(-kInfinity), counts, exponent);
        top[half] = _mm512_max_ps(exponent, top[half]);
        e[i][half] = avx512_common::exp2(exponent);
        sum[half] = _mm512_add_ps(sum[half], e[i][half]);
        if (kSoftcap) e[i][half] = _mm512_mul_ps(e[i][half], slope);
      }
    if (left) Tiles::store_left(left, r, e);
    if (right) Tiles::store_right(right, r, e);
    next = r + 2;
  }

  FASTLOSS_AVX512_INLINE void end(const TokenSums &tokens) const {
    for (int half = 0; half < 2; ++half) {
      float *to = tokens.sum + token + half * 16;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[half]));
      _mm512_storeu_ps(tokens.top + token + half * 16, top[half]);
    }
  }
};

} // namespace fastloss::linear

#endif
