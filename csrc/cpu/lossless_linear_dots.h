// The engine of dot products of bf16 (AVX-512 bf16), for a few rows of x and for machines without tiles.
#pragma once
#include "lossless_linear_groups.h"

#ifdef __x86_64__

namespace fastloss::avx512vbmi {

FASTLOSS_BF16_INLINE __m512 add_dots(__m512 sum, Bytes a, Bytes b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// [n][columns]
FASTLOSS_BF16 static void lay_dots(const LaidRows &x, int64_t first, int64_t count) {
  for (int64_t i = 0; i < x.n; ++i)
    for (int64_t g = i * x.columns + first; g < i * x.columns + first + count; g += kLosslessGroup) {
      Bytes group[kQuarters];
      load_group(x.x + g, group);
      for (int q = 0; q < kQuarters; ++q) _mm512_storeu_si512(static_cast<uint16_t *>(x.laid) + g + 32 * q, group[q]);
    }
}

// Asks for the codes and bytes of the group that is `kAhead` numbers further: the processor's own look ahead ends with
// a page. An address that is not mapped does no harm.
constexpr int64_t kAhead = 4096;
FASTLOSS_BF16_INLINE void look_ahead(const uint8_t *codes, const uint8_t *low) {
  _mm_prefetch(codes + kAhead / kLosslessGroup * kP7GroupBytes, _MM_HINT_T0);
  _mm_prefetch(low + kAhead, _MM_HINT_T0);
  _mm_prefetch(low + kAhead + 64, _MM_HINT_T0);
}

// A row of W by `count` rows of x, `first` the first of them. Those that come first decode it on the way.
template <int count>
FASTLOSS_BF16 static void dots_of_row(const GroupDecoder &decoder, const CodedRows &w, int row, const LaidRows &x,
                                      int64_t first, uint16_t *decoded, float *sums) {
  __m512 sum[count][kQuarters] = {};
  const uint8_t *codes = w.codes_of(row), *low = w.low_of(row);
  const uint16_t *laid = static_cast<const uint16_t *>(x.laid) + first * w.columns;
  for (int64_t g = 0; g < w.columns; g += kLosslessGroup, codes += kP7GroupBytes, laid += kLosslessGroup) {
    Bytes group[kQuarters];
    if (first) {
      for (int q = 0; q < kQuarters; ++q) group[q] = _mm512_loadu_si512(decoded + g + 32 * q);
    } else {
      look_ahead(codes, low + g);
      decoder.decode(codes, low + g, group);
      if (x.n > count)
        for (int q = 0; q < kQuarters; ++q) _mm512_storeu_si512(decoded + g + 32 * q, group[q]);
    }
    for (int i = 0; i < count; ++i)
      for (int q = 0; q < kQuarters; ++q)
        sum[i][q] = add_dots(sum[i][q], group[q], _mm512_loadu_si512(laid + i * w.columns + 32 * q));
  }
  for (int i = 0; i < count; ++i)
    sums[row * x.stride + first + i] =
        _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[i][0], sum[i][1]), _mm512_add_ps(sum[i][2], sum[i][3])));
}

// The sums of four rows of x fill the registers.
FASTLOSS_BF16 static void multiply_dots(const CodedRows &w, const LaidRows &x, uint8_t *room, float *sums) {
  uint16_t *decoded = reinterpret_cast<uint16_t *>(room);
  const GroupDecoder decoder(w.table);
  for (int r = 0; r < w.count; ++r)
    for (int64_t i = 0; i < x.n; i += 4) {
      if (x.n - i >= 4) dots_of_row<4>(decoder, w, r, x, i, decoded, sums);
      else if (x.n - i == 3) dots_of_row<3>(decoder, w, r, x, i, decoded, sums);
      else if (x.n - i == 2) dots_of_row<2>(decoder, w, r, x, i, decoded, sums);
      else dots_of_row<1>(decoder, w, r, x, i, decoded, sums);
    }
}

inline LinearEngine dot_engine() {
  return {1,
          sizeof(uint16_t),
          [](int64_t columns) { return columns * int64_t(sizeof(uint16_t)); },
          [] {},
          [] {},
          lay_dots,
          multiply_dots,
          add_pairs,
          write_sums};
}

} // namespace fastloss::avx512vbmi

#endif
