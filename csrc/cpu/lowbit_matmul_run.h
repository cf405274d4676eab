// Many rows: blocks of rows of x are packed once, each thread unpacks 32 outputs x 512 columns of bits at a time and
// takes them past the rows of the block while they are in the first-level cache.
#pragma once
#include "kept_memory.h"
#include "lowbit_matmul_tiles.h"

#ifdef __x86_64__
#include <omp.h>

namespace fastloss::lowbit {

using linear::kProduct;

// Memory of `count` T, kept for the next call where it is large.
template <class T> class Buffer {
  const size_t bytes;

public:
  T *const data;
  explicit Buffer(int64_t count)
      : bytes(size_t(count) * sizeof(T)), data(static_cast<T *>(take_memory(std::max<size_t>(bytes, 64)))) {}
  ~Buffer() { give_memory(data, std::max<size_t>(bytes, 64)); }
  Buffer(const Buffer &) = delete;
};

template <class Tiles> class PackedRun {
  static constexpr int64_t kColumns = kStepUnits * Tiles::kPerUnit; // of a step
  static constexpr int64_t kPanels = 8; // of 32 outputs: the sums of a block of rows stay in the second-level cache
  const Problem &p;
  const int parts;
  const int64_t rows;          // of a block
  const int64_t chunks, panel; // panel: units of the chunks and parts of 32 rows
  int64_t first, strips;       // the current block: its first row, its panels of 32 rows
  Buffer<uint32_t> left;

public:
  PackedRun(const Problem &p, int parts)
      : p(p), parts(parts), rows(std::min<int64_t>(parts == 1 ? 512 : 256, (p.args.m + kTile - 1) / kTile * kTile)),
        chunks(p.chunks()), panel(chunks * parts * kOperand<Tiles>), left(rows / kTile * panel) {}

  void run() {
    const int64_t panels = (p.end - p.begin + kTile - 1) / kTile, most = omp_get_max_threads();
    const int64_t width = std::min(kPanels, (panels + most - 1) / most), blocks = (panels + width - 1) / width;
    for (first = 0; first < p.args.m; first += rows) {
      strips = (std::min(rows, p.args.m - first) + kTile - 1) / kTile;
#pragma omp parallel num_threads(int(std::min(most, blocks)))
      {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < strips * chunks; ++i)
          pack_left<Tiles>(p, first + i / chunks * kTile, i % chunks, parts, operand(i / chunks, i % chunks));
        // [panel][strip] sums, then those of the integers, one product and one right operand
        const int64_t sums = width * strips * kProduct;
        Buffer<float> scratch(sums * (p.integer() ? 2 : 1) + kProduct);
        Buffer<uint32_t> right(kOperand<Tiles>);
        Tiles::begin();
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < blocks; ++i)
          block(i * width, std::min(panels, (i + 1) * width), scratch.data, right.data);
        Tiles::end();
      }
    }
  }

private:
  uint32_t *operand(int64_t strip, int64_t chunk) const {
    return left.data + strip * panel + chunk * parts * kOperand<Tiles>;
  }

  // Panels [begin, end) of outputs past the rows of the current block. `scratch` begins with room for one product.
  FASTLOSS_AVX512 void block(int64_t begin, int64_t end, float *scratch, uint32_t *right) {
    float *const sums = scratch + kProduct;
    const int64_t wide = strips * kProduct, integers = (end - begin) * wide; // where the sums of integers begin
    const __m512i table = table_of<Tiles>(p);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const std::vector<Segment> found = segments(p, chunk);
      for (int64_t j = begin; j < end; ++j) {
        unpack_right<Tiles>(p, p.begin + j * kTile, chunk, table, right);
        for (const Segment &s : found) {
          float *panel_sums = sums + (j - begin) * wide;
          if (p.integer())
            add_integers(s, chunk, p.begin + j * kTile, right, scratch, panel_sums, panel_sums + integers);
          else add_floats(s, chunk, p.begin + j * kTile, right, scratch, panel_sums);
        }
      }
    }
    for (int64_t j = begin; j < end; ++j)
      for (int64_t strip = 0; strip < strips; ++strip)
        finish(sums + (j - begin) * wide + strip * kProduct, first + strip * kTile, p.begin + j * kTile);
  }

  void group_scales(const Segment &s, int64_t output, float *scale) const {
    for (int64_t lane = 0; lane < kTile; ++lane)
      scale[lane] = output + lane < p.n ? p.group_scale(output + lane, s.group) : 0.f;
  }

  // sums [strip][32][32] += a segment of 32 outputs. A long sum in fp32 is a sum of those of chunks, which loses fewer
  // digits; rounded to 16 bits, that does not show.
  FASTLOSS_AVX512 void add_floats(const Segment &s, int64_t chunk, int64_t output, const uint32_t *right,
                                  float *product, float *sums) {
    alignas(64) float scale[kTile];
    if (p.grouped()) group_scales(s, output, scale);
    else std::fill_n(scale, kTile, 1.f);
    const bool apart = p.grouped() || (p.args.y_dtype == kFloat32 && chunks > 1), start = chunk == 0 && s.begin == 0;
    const int64_t at = s.begin / kColumns * kBlock, steps = (s.end - s.begin + kColumns - 1) / kColumns;
    for (int64_t strip = 0; strip < strips; ++strip, sums += kProduct) {
      const uint32_t *left = operand(strip, chunk) + at;
      Tiles::multiply(left, parts, right + at, steps, apart ? product : sums, !apart && !start);
      if (apart) add_scaled(product, scale, sums, start);
    }
  }

  // The same for an int8 x: a whole group in int32, then its scales.
  FASTLOSS_AVX512 void add_integers(const Segment &s, int64_t chunk, int64_t output, const uint32_t *right,
                                    float *product, float *sums, float *integers) {
    alignas(64) float scale[kTile];
    if (s.last) group_scales(s, output, scale);
    const int64_t at = s.begin / kColumns * kBlock, steps = (s.end - s.begin + kColumns - 1) / kColumns;
    __m512i added[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    if constexpr (Tiles::kAdded != 0) {
      Tiles::add_numbers(right + at, steps, added);
      for (__m512i &one : added) one = _mm512_mullo_epi32(one, _mm512_set1_epi32(Tiles::kAdded));
    }
    for (int64_t strip = 0; strip < strips; ++strip, sums += kProduct, integers += kProduct) {
      Tiles::multiply(operand(strip, chunk) + at, parts, right + at, steps, product, false);
      add_exact(product, added, integers, s.first);
      if (s.last) add_group(integers, p.grouped() ? scale : nullptr, first + strip * kTile, sums, s.group == 0);
    }
  }

  static FASTLOSS_AVX512 void add_scaled(const float *product, const float *scale, float *sum, bool start) {
    for (int64_t i = 0; i < kProduct; i += 16) {
      __m512 before = start ? _mm512_setzero_ps() : _mm512_loadu_ps(sum + i);
      _mm512_storeu_ps(sum + i,
                       _mm512_fmadd_ps(_mm512_loadu_ps(product + i), _mm512_loadu_ps(scale + i % kTile), before));
    }
  }

  // Of 512 columns, an integer below 2^24: exact also as a float.
  static FASTLOSS_AVX512 void add_exact(const float *product, const __m512i (&added)[2], float *integers, bool start) {
    for (int64_t i = 0; i < kProduct; i += 16) {
      __m512i value =
          Tiles::kIntegers ? _mm512_loadu_si512(product + i) : _mm512_cvtps_epi32(_mm512_loadu_ps(product + i));
      value = _mm512_sub_epi32(value, added[i / 16 % 2]);
      _mm512_storeu_si512(integers + i, start ? value : _mm512_add_epi32(value, _mm512_loadu_si512(integers + i)));
    }
  }

  FASTLOSS_AVX512 void add_group(const float *integers, const float *scale, int64_t row, float *sum, bool start) {
    for (int64_t i = 0; i < kProduct; i += 16) {
      const int64_t at = row + i / kTile;
      __m512 value = _mm512_cvtepi32_ps(_mm512_loadu_si512(integers + i));
      value = _mm512_mul_ps(value, _mm512_set1_ps(at < p.args.m ? p.row_scale(at) : 0.f));
      if (scale) value = _mm512_mul_ps(value, _mm512_loadu_ps(scale + i % kTile));
      _mm512_storeu_ps(sum + i, start ? value : _mm512_add_ps(value, _mm512_loadu_ps(sum + i)));
    }
  }

  FASTLOSS_AVX512 void finish(const float *sum, int64_t row, int64_t output) {
    if (p.args.y_dtype == kFloat32) write<float>(sum, row, output);
    else if (p.args.y_dtype == kFloat16) write<Float16>(sum, row, output);
    else write<BFloat16>(sum, row, output);
  }

  template <class T> FASTLOSS_AVX512 void write(const float *sum, int64_t row, int64_t output) {
    alignas(64) float scale[kTile], bias[kTile];
    const int64_t count = std::min(kTile, p.end - output);
    for (int64_t lane = 0; lane < kTile; ++lane) {
      scale[lane] = lane < count ? p.last_scale(output + lane) : 0.f;
      bias[lane] = lane < count ? p.bias(output + lane) : 0.f;
    }
    for (int64_t r = 0; r < kTile && row + r < p.args.m; ++r)
      for (int64_t lane = 0; lane < count; lane += 16) {
        __m512 value = _mm512_mul_ps(_mm512_loadu_ps(sum + r * kTile + lane), _mm512_load_ps(scale + lane));
        if (p.args.bias) value = _mm512_add_ps(value, _mm512_load_ps(bias + lane));
        linear::store_some(static_cast<T *>(p.args.y) + (row + r) * p.n + output + lane, value, count - lane);
      }
  }
};

} // namespace fastloss::lowbit

#endif
