// Product 3 of linear cross entropy: a thread takes a few strips of columns past every token of the chunk.
#pragma once
#include "linear_run.h"

#ifdef __x86_64__

namespace fastloss::linear {

// What the third product adds token by token: the targets, sorted, and the tokens' sum for the column weights.
template <class Tiles, class T> FASTLOSS_AVX512 void LinearRun<Tiles, T>::gather_by_target() {
  by_target.clear();
  for (int64_t i = 0; i < tokens; ++i)
    if (target[i] >= 0) by_target.push_back({target[i], int32_t(i)});
  std::sort(by_target.begin(), by_target.end());
  if (!with_sum) return;
  column_total = 0;
  weighted_x.assign(size_t(d), 0.f);
  for (int64_t i = 0; i < tokens; ++i) {
    column_total += column[i];
    add_row(weighted_x.data(), column[i], x + row[i] * args.ldx, d);
  }
}

// Product 3 for a few strips, with everything else that belongs to their columns.
template <class Tiles, class T>
FASTLOSS_AVX512 void LinearRun<Tiles, T>::weight_gradient(int64_t strip, int64_t count, Scratch &mine) {
  const int64_t x_stride = panels * kPanelUnits;
  std::vector<float> bias_gradient(size_t(count * kTile), 0.f);
  if (dw) memset(mine.gradient.get(), 0, size_t(count * panels_d * kProduct) * sizeof(float));
  if (store.end < panels) pack_columns(strip, count, mine);
  for (int64_t p = 0, end; p < panels; p = end) {
    end = std::min(p + kCachedPanels, p < store.end ? store.end : panels);
    const bool stored = p < store.end;
    const Store again{mine.again.get(), nullptr, kCachedPanels * kPanelUnits, -1, p, end};
    if (!stored) compute_again(strip, count, again, mine);
    for (int64_t s = 0; s < count; ++s) {
      const uint32_t *left = stored ? store.at(strip + s, p, kPanelUnits) : again.at(s, p, kPanelUnits);
      for (int64_t j = 0; dw && j < panels_d; ++j) {
        float *product = mine.gradient.get() + (s * panels_d + j) * kProduct;
        FetchProduct fetch{product + kProduct};
        Tiles::multiply(left, scaled_x.get() + j * x_stride + p * kPanelUnits, (end - p) * kPanelSteps, product, true,
                        fetch);
      }
      for (int64_t r = 0; args.dbias && r < kTile; ++r) {
        __m512 total = _mm512_setzero_ps();
        for (int64_t q = p; q < end; ++q)
          total = Tiles::weighted(left + (q - p) * kPanelUnits, r, factor.data() + q * kTile, total);
        bias_gradient[s * kTile + r] += _mm512_reduce_add_ps(total);
      }
    }
  }
  add_targets(strip, count, bias_gradient.data(), mine);
  if (dw) store_dw(strip, count, mine);
  for (int64_t j = strip * kTile; args.dbias && j < std::min(v, (strip + count) * kTile); ++j) {
    const double of_sum = with_sum ? weight_of(j) * column_total : 0.;
    args.dbias[j] += float(bias_gradient[j - strip * kTile] + of_sum);
  }
}

template <class Tiles, class T>
FASTLOSS_AVX512 void LinearRun<Tiles, T>::compute_again(int64_t strip, int64_t count, const Store &to, Scratch &mine) {
  const TokenSums nowhere{offset.data(), target.data(), mine.ignored_sum.get(), mine.ignored_top.get()};
  for (int64_t p = to.first; p < to.end; p += kGroup) {
    int64_t group[kGroup], members = std::min(kGroup, to.end - p);
    for (int64_t m = 0; m < members; ++m) group[m] = p + m;
    logits(strip, count, group, members, nowhere, to, 0, nullptr, mine);
  }
}

template <class Tiles, class T>
FASTLOSS_AVX512 void LinearRun<Tiles, T>::add_targets(int64_t strip, int64_t count, float *bias_gradient,
                                                      Scratch &mine) {
  const int32_t first = int32_t(strip * kTile);
  auto next = std::lower_bound(by_target.begin(), by_target.end(), std::make_pair(first, int32_t(-1)));
  for (; next != by_target.end() && next->first < first + count * kTile; ++next) {
    const int64_t r = next->first - first, i = next->second;
    bias_gradient[r] += own[i];
    for (int64_t j = 0; dw && j < d; j += kTile)
      add_row(gradient_row(mine, r, j), own[i], x + row[i] * args.ldx + j, std::min(kTile, d - j));
  }
}

// 32 numbers of a row of the gradient of a block of columns
template <class Tiles, class T> float *LinearRun<Tiles, T>::gradient_row(Scratch &mine, int64_t r, int64_t j) const {
  return mine.gradient.get() + (r / kTile * panels_d + j / kTile) * kProduct + r % kTile * kTile;
}

template <class Tiles, class T>
FASTLOSS_AVX512 void LinearRun<Tiles, T>::store_dw(int64_t strip, int64_t count, Scratch &mine) {
  const bool first = first_token == 0, last = first_token + chunk >= int64_t(kept.size());
  float *accumulator = args.dw_accumulator ? args.dw_accumulator : own_accumulator.get();
  for (int64_t r = 0; r < std::min(count * kTile, v - strip * kTile); ++r) {
    const int64_t column_of_row = strip * kTile + r;
    for (int64_t j = 0; j < d; j += kTile) {
      float *sums = gradient_row(mine, r, j);
      const int64_t length = std::min(kTile, d - j);
      if (with_sum) add_row(sums, weight_of(column_of_row), weighted_x.data() + j, length);
      float *total = accumulator + column_of_row * d + j;
      if (!first) add_row(sums, 1.f, total, length);
      for (int64_t k = 0; k < length; k += 16) {
        const __m512 values = _mm512_loadu_ps(sums + k);
        if (last) store_some(dw + column_of_row * d + j + k, values, length - k);
        else store_some(total + k, values, length - k);
      }
    }
  }
}

} // namespace fastloss::linear

#endif
