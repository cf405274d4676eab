// Few rows, as in decoding: the time is that of reading the bits. Nothing is unpacked: of four columns of x there are
// 16 sums with signs, one vector, and four bits of 16 outputs look their sums up in it.
//
// A bit is (1 + s) / 2 with a sign s, so value = (offset + sum of weights / 2) + sum over planes of weight / 2 s. For
// binary numbers that cancels no more than the product itself does; of others a value of 0 is a difference of sums, so
// the error is one in units of sum |x| max |value|, not of sum |x value|.
#pragma once
#include "lowbit_matmul_operands.h"

#ifdef __x86_64__

namespace fastloss::lowbit {

constexpr int64_t kFewRows = 8;
constexpr int64_t kFewSums = 16;     // rows x planes; with more, unpacking costs less than looking up
constexpr float kLargest = 0x1p120f; // beyond it, sums of four with either sign may not be finite
constexpr int64_t kLanes = 16;
constexpr int64_t kQuads = kChunk / 4, kPiece = 64; // a group has a whole number of pieces

template <int ROWS> class FewRows {
  const Problem &p;
  const float *const x; // [ROWS][chunks * kChunk]
  const int64_t row, begin, end;
  float *const sums;       // [ROWS][end - begin]
  int32_t *const integers; // the same, of an int8 x
  alignas(64) float tables[ROWS][kQuads][16];
  float totals[ROWS][kChunk / kPiece];

public:
  // Outputs [begin, end) of up to ROWS rows; begin a multiple of 16 beyond p.begin.
  FewRows(const Problem &p, const float *x, int64_t row, int64_t begin, int64_t end, float *sums, int32_t *integers)
      : p(p), x(x), row(row), begin(begin), end(end), sums(sums), integers(integers) {}

  FASTLOSS_AVX512 void run() {
    for (int64_t chunk = 0; chunk < p.chunks(); ++chunk) {
      tabulate(chunk);
      const std::vector<Segment> found = segments(p, chunk);
      for (int64_t output = begin; output < end; output += kLanes) {
        switch (p.planes()) {
        case 1:
          look_up<1>(output, chunk, found);
          break;
        case 2:
          look_up<2>(output, chunk, found);
          break;
        case 3:
          look_up<3>(output, chunk, found);
          break;
        default:
          look_up<4>(output, chunk, found);
        }
      }
    }
    for (int64_t r = 0; r < ROWS && row + r < p.args.m; ++r)
      for (int64_t i = 0; i < end - begin; ++i) finish(p, row + r, begin + i, sums[r * (end - begin) + i]);
  }

private:
  FASTLOSS_AVX512 void tabulate(int64_t chunk) {
    __m512 signs[4];
    for (int j = 0; j < 4; ++j) {
      constexpr uint16_t kSet[4] = {0xaaaa, 0xcccc, 0xf0f0, 0xff00}; // entries whose bit j is 1
      signs[j] = _mm512_mask_mov_ps(_mm512_set1_ps(-1.f), kSet[j], _mm512_set1_ps(1.f));
    }
    for (int r = 0; r < ROWS; ++r) {
      const float *from = x + (r * p.chunks() + chunk) * kChunk;
      for (int64_t quad = 0; quad < kQuads; ++quad) {
        __m512 sum = _mm512_mul_ps(_mm512_set1_ps(from[quad * 4]), signs[0]);
        for (int j = 1; j < 4; ++j) sum = _mm512_fmadd_ps(_mm512_set1_ps(from[quad * 4 + j]), signs[j], sum);
        _mm512_store_ps(tables[r][quad], sum);
      }
      for (int64_t piece = 0; piece < kChunk / kPiece; ++piece) {
        __m512 total = _mm512_setzero_ps();
        for (int64_t i = 0; i < kPiece; i += 16)
          total = _mm512_add_ps(total, _mm512_loadu_ps(from + piece * kPiece + i));
        totals[r][piece] = _mm512_reduce_add_ps(total);
      }
    }
  }

  // 32 columns of 16 outputs, added pairwise.
  static FASTLOSS_AVX512_INLINE __m512 word_sum(const float (*quads)[16], __m512i word) {
    __m512 sum[8];
#pragma GCC unroll 8
    for (int t = 0; t < 8; ++t)
      sum[t] = _mm512_permutexvar_ps(_mm512_srli_epi32(word, 4 * t), _mm512_load_ps(quads[t]));
#pragma GCC unroll 4
    for (int step = 4; step; step /= 2)
      for (int t = 0; t < step; ++t) sum[t] = _mm512_add_ps(sum[t], sum[t + step]);
    return sum[0];
  }

  template <int PLANES>
  FASTLOSS_AVX512_INLINE void look_up(int64_t output, int64_t chunk, const std::vector<Segment> &found) {
    __m512i words[PLANES][16];
    for (int plane = 0; plane < PLANES; ++plane) {
      load_words(p, plane, output, chunk, words[plane]);
      const uint8_t *next = p.row(plane, output + kLanes) + chunk * kRowBytes;
      for (int64_t i = 0; i < kLanes && output + kLanes + i < end; ++i) _mm_prefetch(next + i * p.line, _MM_HINT_T0);
    }
    float center = float(p.args.w.offset);
    for (int plane = 0; plane < PLANES; ++plane) center += 0.5f * float(p.args.w.weights[plane]);
    for (const Segment &s : found) {
      const int64_t first = s.begin / 32, last = (s.end + 31) / 32;
      __m512 value[ROWS];
      for (int r = 0; r < ROWS; ++r) {
        float total = 0.f;
        for (int64_t piece = s.begin / kPiece; piece * kPiece < s.end; ++piece) total += totals[r][piece];
        value[r] = _mm512_set1_ps(center * total);
      }
      for (int plane = 0; plane < PLANES; ++plane) {
        __m512 sum[ROWS];
        for (int r = 0; r < ROWS; ++r) sum[r] = _mm512_setzero_ps();
        for (int64_t j = first; j < last; ++j)
#pragma GCC unroll 4
          for (int r = 0; r < ROWS; ++r) sum[r] = _mm512_add_ps(sum[r], word_sum(tables[r] + j * 8, words[plane][j]));
        const __m512 weight = _mm512_set1_ps(0.5f * float(p.args.w.weights[plane]));
        for (int r = 0; r < ROWS; ++r) value[r] = _mm512_fmadd_ps(weight, sum[r], value[r]);
      }
      add(output, chunk, s, value);
    }
  }

  FASTLOSS_AVX512_INLINE void add(int64_t output, int64_t chunk, const Segment &s, const __m512 (&value)[ROWS]) {
    const int64_t count = std::min(kLanes, end - output), stride = end - begin;
    __m512 scale = _mm512_set1_ps(1.f);
    if (p.grouped()) {
      alignas(64) float lanes[kLanes] = {};
      for (int64_t i = 0; i < count; ++i) lanes[i] = p.group_scale(output + i, s.group);
      scale = _mm512_load_ps(lanes);
    }
    for (int r = 0; r < ROWS && row + r < p.args.m; ++r) {
      float *sum = sums + r * stride + output - begin;
      const bool start = chunk == 0 && s.begin == 0;
      __m512 more = value[r];
      if (p.integer()) { // exact in float so far, and from here in int32
        int32_t *whole = integers + r * stride + output - begin;
        const __mmask16 mask = avx512::first(count);
        __m512i exact = _mm512_cvtps_epi32(more);
        if (!s.first) exact = _mm512_add_epi32(exact, _mm512_maskz_loadu_epi32(mask, whole));
        _mm512_mask_storeu_epi32(whole, mask, exact);
        if (!s.last) continue;
        more = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_set1_ps(p.row_scale(row + r)));
      }
      if (p.grouped()) more = _mm512_mul_ps(more, scale);
      const bool only = p.integer() ? s.group == 0 : start;
      linear::store_some(sum, only ? more : _mm512_add_ps(more, linear::load_some(sum, count)), count);
    }
  }
};

} // namespace fastloss::lowbit

#endif
