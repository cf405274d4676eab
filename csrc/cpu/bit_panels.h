// Planes of bits as panels of int8, the operands of the engines that multiply int8: VNNI and AMX.
//
// A step is 64 columns. Its columns may come in any order as long as it is one for both operands; here byte i of quad q
// is column 32 (q / 8) + 8 i + q mod 8, so that a quad is one bit of each byte of a 32-bit word, which one test makes.
//   left panel    [step][32 rows][16 quads of 4 bytes]
//   right panel   [step][2 halves][16 quads][16 lanes of 4 bytes]: 32 rows of b are the lanes
//   sums          [32 rows][stride] int32
// Columns that do not exist are 0 in the left panel; rows that do not exist may be anything.
#pragma once
#include "../bits.h"
#include "linear_tiles_amx.h"

#ifdef __x86_64__

#define FASTLOSS_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define FASTLOSS_PANEL __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define FASTLOSS_PANEL_INLINE __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"), always_inline)) inline

namespace fastloss::bits {

constexpr int64_t kPanel = 32;                        // rows of a left, lanes of a right panel
constexpr int64_t kStepColumns = 64;                  // columns of a step
constexpr int64_t kStepBytes = kPanel * kStepColumns; // of either panel
constexpr int64_t kHalfBytes = kStepBytes / 2;

inline int64_t steps_of(int64_t columns) { return (columns + kStepColumns - 1) / kStepColumns; }

// How to make bytes of the bits of P planes.
template <int P> struct Decoder {
  __m512i offset, weights[P];
  FASTLOSS_PANEL_INLINE Decoder(const Planes &planes, int lift) : offset(_mm512_set1_epi8(char(planes.offset + lift))) {
    for (int p = 0; p < P; ++p) weights[p] = _mm512_set1_epi8(char(planes.weights[p]));
  }
  // The bytes whose bit is the one that `select` has.
  FASTLOSS_PANEL_INLINE __m512i operator()(const __m512i (&words)[P], __m512i select) const {
    __m512i value = offset;
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p)
      value = _mm512_mask_add_epi8(value, _mm512_test_epi8_mask(words[p], select), value, weights[p]);
    return value;
  }
};

// A row's 64 columns: one half of the word in the lower 8 quads, the other in the upper.
FASTLOSS_PANEL_INLINE __m512i halves(uint64_t word) {
  return _mm512_mask_set1_epi32(_mm512_set1_epi32(int(word)), 0xff00, int(word >> 32));
}

FASTLOSS_PANEL_INLINE __m512i quads_in_order() { // the bit of quad q, in each of its bytes
  return _mm512_sllv_epi32(_mm512_set1_epi32(0x01010101),
                           _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7));
}

// `count` rows (32 at most) from `row` on, steps [begin, end) -> left panel. `lift` is added to every value; a column
// that does not exist is then `lift`, too.
template <int P>
FASTLOSS_PANEL void left_panel(const Planes &planes, int64_t row, int64_t count, int64_t begin, int64_t end, int lift,
                               uint8_t *to) {
  const Decoder<P> decode(planes, lift);
  const __m512i select = quads_in_order(), nothing = _mm512_set1_epi8(char(lift));
  const int64_t bytes = row_bytes(planes.columns), plane = planes.rows * bytes, full = planes.columns / kStepColumns;
  constexpr int64_t kGroup = kRowBytes / 8; // steps of a line of bits; all rows before the next ones
  for (int64_t first = begin; first < end; first += kGroup)
    for (int64_t r = 0; r < count; ++r) {
      const uint8_t *from = planes.bits + (row + r) * bytes;
      uint8_t *at = to + (first - begin) * kStepBytes + r * kStepColumns;
      for (int64_t step = first; step < std::min(first + kGroup, end); ++step, at += kStepBytes) {
        __m512i words[P];
        for (int p = 0; p < P; ++p) {
          uint64_t word;
          memcpy(&word, from + p * plane + step * 8, sizeof word);
          words[p] = halves(word);
        }
        __m512i value = decode(words, select);
        if (step >= full) {
          const uint64_t exist = (uint64_t(1) << (planes.columns - full * kStepColumns)) - 1;
          value = _mm512_mask_mov_epi8(nothing, _mm512_test_epi8_mask(halves(exist), select), value);
        }
        _mm512_store_si512(at, value);
      }
    }
}

// 32 rows from `row` on, as far as they exist, steps [begin, end) -> right panel. `begin` is a multiple of 8.
template <int P>
FASTLOSS_PANEL void right_panel(const Planes &planes, int64_t row, int64_t begin, int64_t end, uint8_t *to) {
  const Decoder<P> decode(planes, 0);
  const int64_t bytes = row_bytes(planes.columns), plane = planes.rows * bytes;
  constexpr int64_t kGroup = kRowBytes / 8;
  for (int64_t first = begin; first < end; first += kGroup)
    for (int half = 0; half < 2; ++half) {
      __m512i lines[P][16]; // of 16 rows; then words of 32 columns, a row a lane
      for (int p = 0; p < P; ++p) {
        for (int i = 0; i < 16; ++i)
          lines[p][i] = _mm512_loadu_si512(planes.bits + p * plane + first * 8 +
                                           std::min(row + half * 16 + i, planes.rows - 1) * bytes);
        linear::transpose_units(lines[p]);
      }
      for (int64_t step = first; step < std::min(first + kGroup, end); ++step) {
        uint8_t *quads = to + (step - begin) * kStepBytes + half * kHalfBytes;
        for (int part = 0; part < 2; ++part) {
          __m512i words[P];
          for (int p = 0; p < P; ++p) words[p] = lines[p][2 * (step - first) + part];
          __m512i select = _mm512_set1_epi8(1);
          for (int q = 0; q < 8; ++q, quads += 64, select = _mm512_add_epi8(select, select))
            _mm512_store_si512(quads, decode(words, select));
        }
      }
    }
}

// The engines: `multiply` makes the sums of one left and one right panel, of which `rows` and `lanes` matter, or adds
// to them. kLift is what an engine wants added to the values of the left panel; `start` [32] takes its effect back.
struct VnniPanels {
  static constexpr int kLift = 128; // its left operand has no sign
  static void begin() {}
  static void end() {}

  template <int kRows>
  static FASTLOSS_VNNI void multiply_rows(const uint8_t *left, const uint8_t *right, int64_t steps,
                                          const __m512i (&start)[2], int32_t *sums, int64_t stride, bool accumulate) {
    __m512i sum[kRows][2];
    for (int r = 0; r < kRows; ++r)
      for (int half = 0; half < 2; ++half)
        sum[r][half] =
            accumulate ? _mm512_add_epi32(start[half], _mm512_loadu_si512(sums + r * stride + half * 16)) : start[half];
    for (int64_t step = 0; step < steps; ++step, left += kStepBytes, right += kStepBytes)
      for (int64_t quad = 0; quad < 16; ++quad) {
        const __m512i low = _mm512_load_si512(right + quad * 64);
        const __m512i high = _mm512_load_si512(right + kHalfBytes + quad * 64);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
          int32_t four;
          memcpy(&four, left + r * kStepColumns + quad * 4, sizeof four);
          sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], _mm512_set1_epi32(four), low);
          sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], _mm512_set1_epi32(four), high);
        }
      }
    for (int r = 0; r < kRows; ++r)
      for (int half = 0; half < 2; ++half) _mm512_storeu_si512(sums + r * stride + half * 16, sum[r][half]);
  }

  static FASTLOSS_VNNI void multiply(const uint8_t *left, const uint8_t *right, int64_t steps, int64_t rows, int64_t,
                                     int32_t *sums, int64_t stride, bool accumulate) {
    const __m512i lift = _mm512_set1_epi8(char(kLift));
    __m512i start[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t line = 0; line < 16 * steps; ++line) // what `lift` alone adds to every row
      for (int half = 0; half < 2; ++half) {
        const uint8_t *from = right + line / 16 * kStepBytes + half * kHalfBytes + line % 16 * 64;
        start[half] = _mm512_dpbusd_epi32(start[half], lift, _mm512_load_si512(from));
      }
    for (__m512i &half : start) half = _mm512_sub_epi32(_mm512_setzero_si512(), half);
    int64_t r = 0;
    for (; r + 8 <= rows; r += 8)
      multiply_rows<8>(left + r * kStepColumns, right, steps, start, sums + r * stride, stride, accumulate);
    for (; r < rows; r += 1)
      multiply_rows<1>(left + r * kStepColumns, right, steps, start, sums + r * stride, stride, accumulate);
  }
};

#define FASTLOSS_AMX_INT8 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-int8"), noinline))

struct AmxPanels {
  static constexpr int kLift = 0;
  static FASTLOSS_AMX_INT8 void begin() { linear::AmxTiles::begin(); }
  static FASTLOSS_AMX_INT8 void end() { linear::AmxTiles::end(); }

  static FASTLOSS_AMX_INT8 void multiply(const uint8_t *left, const uint8_t *right, int64_t steps, int64_t rows,
                                         int64_t lanes, int32_t *sums, int64_t stride, bool accumulate) {
    const int64_t row = stride * int64_t(sizeof(int32_t));
    int32_t *below = sums + 16 * stride;
    asm volatile("" ::: "memory"); // GCC's tile loads do not say that they read memory
    if (accumulate) {
      _tile_loadd(0, sums, row);
      _tile_loadd(1, sums + 16, row);
      _tile_loadd(2, below, row);
      _tile_loadd(3, below + 16, row);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    // Both operands come from the second-level cache, whatever is done about it: past the first-level one is faster.
    if (rows > 16 && lanes > 16)
      for (int64_t step = 0; step < steps; ++step, left += kStepBytes, right += kStepBytes) {
        _tile_stream_loadd(6, right, 64);
        _tile_stream_loadd(4, left, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_stream_loadd(5, left + kHalfBytes, 64);
        _tile_dpbssd(2, 5, 6);
        _tile_stream_loadd(7, right + kHalfBytes, 64);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(3, 5, 7);
      }
    else
      for (int64_t step = 0; step < steps; ++step, left += kStepBytes, right += kStepBytes) {
        _tile_loadd(6, right, 64);
        _tile_loadd(4, left, 64);
        _tile_dpbssd(0, 4, 6);
        if (rows > 16) {
          _tile_loadd(5, left + kHalfBytes, 64);
          _tile_dpbssd(2, 5, 6);
        }
        if (lanes > 16) {
          _tile_loadd(7, right + kHalfBytes, 64);
          _tile_dpbssd(1, 4, 7);
        }
      }
    _tile_stored(0, sums, row);
    _tile_stored(1, sums + 16, row);
    _tile_stored(2, below, row);
    _tile_stored(3, below + 16, row);
  }
};

} // namespace fastloss::bits

#endif
