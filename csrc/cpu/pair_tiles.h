// The engines of linear_tiles.h as the pair kernels use them: with operands of any dtype, and rows that are not valid.
#pragma once
#include "linear_packing.h"
#include "linear_tiles_amx.h"
#include "pair_problem.h"

#ifdef __x86_64__

namespace fastloss::pairs {

template <class Base> struct PackedTiles {
  static constexpr int64_t kPerUnit = Base::kPerUnit;
  static constexpr int64_t kPanelUnits = 2 / kPerUnit * kBlock; // an operand of 32 x 32
  static void begin() { Base::begin(); }
  static void end() { Base::end(); }

  // Nothing to do beside a product.
  struct NoWork {
    FASTLOSS_AVX512_INLINE bool pending() const { return false; }
    FASTLOSS_AVX512_INLINE void two_rows() {}
  };
  static FASTLOSS_AVX512 void make_product(const uint32_t *left, const uint32_t *right, int64_t steps, float *product,
                                           bool accumulate) {
    NoWork none;
    Base::multiply(left, right, steps, product, accumulate, none);
  }
  // `next` is what the next product will be added to.
  static FASTLOSS_AVX512 void add_product(const uint32_t *left, const uint32_t *right, int64_t steps, float *product,
                                          const float *next) {
    linear::FetchProduct fetch{next};
    Base::multiply(left, right, steps, product, true, fetch);
  }

  // A panel of rows -> left operand, reduction along the row.
  static FASTLOSS_AVX512 void pack_left(const Operand &x, int64_t panel, int64_t steps, uint32_t *to) {
    int64_t row_of[kTile];
    x.numbers(panel, row_of);
    each_dtype(x, [&](auto *data) __attribute__((target(FASTLOSS_AVX512_TARGET))) {
      linear::pack_left<Base>(data + panel * kTile * x.ld, x.ld, std::min(kTile, x.rows - panel * kTile), x.d, steps,
                              to);
    });
    for (int64_t r = 0; r < kTile; ++r)
      for (int64_t step = 0; row_of[r] < 0 && step < steps; ++step)
        memset(to + step * kBlock + r * kStepUnits, 0, kStepUnits * sizeof *to);
  }
  // A panel of rows -> right operand, reduction along the row.
  static FASTLOSS_AVX512 void pack_right(const Operand &x, int64_t panel, int64_t steps, uint32_t *to) {
    int64_t row_of[kTile];
    x.numbers(panel, row_of);
    each_dtype(x, [&](auto *data) __attribute__((target(FASTLOSS_AVX512_TARGET))) {
      linear::pack_right<Base>(data, x.ld, row_of, x.d, steps, to);
    });
  }
  // A panel of rows -> right operands, reduction along the rows: one for each 32 columns, `stride` units apart.
  static FASTLOSS_AVX512 void pack_lanes(const Operand &x, int64_t panel, int64_t stride, uint32_t *to) {
    static const std::vector<float> ones(kTile, 1.f);
    int64_t row_of[kTile];
    x.numbers(panel, row_of);
    each_dtype(x, [&](auto *data) __attribute__((target(FASTLOSS_AVX512_TARGET))) {
      linear::pack_scaled<Base>(data, x.ld, row_of, ones.data(), x.d, stride, to);
    });
  }
  // Left operands of `count` panels -> the left operand of their transpose.
  static FASTLOSS_AVX512 void transpose(const uint32_t *from, int64_t count, int64_t steps, uint32_t *to) {
    linear::pack_transposed<Base>(from, count, steps, to);
  }
  // A product of fp32 -> left operand, reduction along the lanes, and right operand, along the rows. Either may be
  // null.
  static FASTLOSS_AVX512 void store_operands(const float *product, uint32_t *left, uint32_t *right) {
    for (int64_t r = 0; r < kTile; r += 2) {
      __m512 rows[2][2];
      for (int i = 0; i < 2; ++i)
        for (int half = 0; half < 2; ++half) rows[i][half] = _mm512_loadu_ps(product + (r + i) * kTile + half * 16);
      if (left) Base::store_left(left, r, rows);
      if (right) Base::store_right(right, r, rows);
    }
  }

private:
  template <class Body> static FASTLOSS_AVX512 void each_dtype(const Operand &x, const Body &body) {
    if constexpr (kPerUnit == 2) body(static_cast<const BFloat16 *>(x.data));
    else if (x.dtype == kFloat32) body(static_cast<const float *>(x.data));
    else if (x.dtype == kFloat16) body(static_cast<const Float16 *>(x.data));
    else body(static_cast<const BFloat16 *>(x.data));
  }
};

} // namespace fastloss::pairs

#endif
