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

  FASTLOSS_AVX512 void block(int64_t begin, int64_t end, float *scratch, uint32_t *right) {
    float *const sums = scratch + kProduct;
    int32_t *const integers = reinterpret_cast<int32_t *>(sums + (end - begin) * strips * kProduct);
    const __m512i table = table_of<Tiles>(p);
    constexpr int64_t kColumns = kStepUnits * Tiles::kPerUnit;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const std::vector<Segment> parts_of_chunk = segments(p, chunk);
      for (int64_t j = begin; j < end; ++j) {
        const int64_t output = p.begin + j * kTile;
        unpack_right<Tiles>(p, output, chunk, table, right);
        for (const Segment &s : parts_of_chunk) {
          alignas(64) float scale[kTile];
          for (int64_t lane = 0; p.grouped() && lane < kTile; ++lane)
            scale[lane] = output + lane < p.n ? p.group_scale(output + lane, s.group) : 0.f;
          const int64_t step = s.begin / kColumns, steps = (s.end - s.begin + kColumns - 1) / kColumns;
          for (int64_t strip = 0; strip < strips; ++strip) {
            const uint32_t *a = operand(strip, chunk) + step * kBlock, *b = right + step * kBlock;
            float *sum = sums + ((j - begin) * strips + strip) * kProduct;
            const bool start = chunk == 0 && s.begin == 0; // of all sums
            if (!p.integer() && !p.grouped()) {
              Tiles::multiply(a, parts, b, steps, sum, !start);
              continue;
            }
            Tiles::multiply(a, parts, b, steps, scratch, false);
            if (!p.integer()) {
              add_scaled(scratch, scale, sum, start);
            } else {
              int32_t *whole = integers + ((j - begin) * strips + strip) * kProduct;
              add_integers(scratch, whole, s.first);
              if (s.last) add_group(whole, p.grouped() ? scale : nullptr, first + strip * kTile, sum, s.group == 0);
            }
          }
        }
      }
    }
    for (int64_t j = begin; j < end; ++j)
      for (int64_t strip = 0; strip < strips; ++strip)
        finish(sums + ((j - begin) * strips + strip) * kProduct, first + strip * kTile, p.begin + j * kTile);
  }

  static FASTLOSS_AVX512 void add_scaled(const float *product, const float *scale, float *sum, bool start) {
    for (int64_t i = 0; i < kProduct; i += 16) {
      __m512 before = start ? _mm512_setzero_ps() : _mm512_loadu_ps(sum + i);
      _mm512_storeu_ps(sum + i,
                       _mm512_fmadd_ps(_mm512_loadu_ps(product + i), _mm512_loadu_ps(scale + i % kTile), before));
    }
  }

  // A product of 512 columns is an integer below 2^24, also as a float.
  static FASTLOSS_AVX512 void add_integers(const float *product, int32_t *sum, bool start) {
    for (int64_t i = 0; i < kProduct; i += 16) {
      __m512i value =
          Tiles::kIntegers ? _mm512_loadu_si512(product + i) : _mm512_cvtps_epi32(_mm512_loadu_ps(product + i));
      _mm512_storeu_si512(sum + i, start ? value : _mm512_add_epi32(value, _mm512_loadu_si512(sum + i)));
    }
  }

  FASTLOSS_AVX512 void add_group(const int32_t *whole, const float *scale, int64_t row, float *sum, bool start) {
    for (int64_t i = 0; i < kProduct; i += 16) {
      const int64_t at = row + i / kTile;
      __m512 value = _mm512_cvtepi32_ps(_mm512_loadu_si512(whole + i));
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
