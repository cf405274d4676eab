// Products 1 and 2 of linear cross entropy: a thread takes its tokens past every column, then finishes them.
#pragma once
#include "../margin_loss.h"
#include "linear_run.h"

#ifdef __x86_64__

namespace fastloss::linear {

// Offset, target and packed x of a panel.
template <class Tiles, class T> FASTLOSS_AVX512 void LinearRun<Tiles, T>::prepare(int64_t panel) {
  for (int64_t i = panel * kTile; i < (panel + 1) * kTile; ++i) {
    target[i] = -1;
    own_logit[i] = -kInfinity;
    offset[i] = row[i] < 0 ? kInfinity : 0.f; // padding: every exponential is 0
    if (row[i] < 0) continue;
    const int64_t y = args.target ? args.target[row[i]] : -1;
    if (y >= 0 && y < v) {
      target[i] = int32_t(y);
      own_logit[i] = mapped_logit(row[i], y);
      if (std::isfinite(own_logit[i])) offset[i] = own_logit[i];
    } else {
      if (args.target) own_logit[i] = std::numeric_limits<float>::quiet_NaN();
      const float guess = mapped_logit(row[i], 0);
      if (std::isfinite(guess)) offset[i] = guess;
    }
  }
  pack_right<Tiles>(x, args.ldx, row.data() + panel * kTile, d, steps_d, x_right.get() + panel * steps_d * kBlock);
  clear_sums(panel);
}

// z log2 e of one column
template <class Tiles, class T> FASTLOSS_AVX512 float LinearRun<Tiles, T>::mapped_logit(int64_t i, int64_t j) const {
  float logit = dot(x + i * args.ldx, w + j * args.ldw, d) + bias_of(j);
  if (args.softcap != 0) logit = std::tanh(logit * map.inner);
  return logit * map.log2_scale;
}

template <class Tiles, class T> void LinearRun<Tiles, T>::clear_sums(int64_t panel) {
  for (int64_t i = panel * kTile; i < (panel + 1) * kTile; ++i) {
    sum[i] = block_sum[i] = 0;
    top[i] = -kInfinity;
  }
  if (dx) memset(dx_sums.get() + panel * panels_d * kProduct, 0, size_t(panels_d * kProduct) * sizeof(float));
}

// Products 1 and 2 for the thread's panels, block after block of columns.
template <class Tiles, class T> FASTLOSS_AVX512 void LinearRun<Tiles, T>::sweep(Scratch &mine) {
  const TokenSums sums{offset.data(), target.data(), block_sum.data(), top.data()};
  const int64_t count = mine.panels.size();
  for (int64_t strip = 0; count && strip < strips; strip += block_strips) {
    const int64_t here = std::min(block_strips, strips - strip);
    pack_columns(strip, here, mine);
    if (dx) pack_transposed<Tiles>(mine.w.get(), here, steps_d, mine.w_transposed.get());
    for (int64_t g = 0; g < count; g += kGroup) {
      const int64_t *group = mine.panels.data() + g, members = std::min(kGroup, count - g);
      logits(strip, here, group, members, sums, store, strip, dx ? mine.exponentials.get() : nullptr, mine);
      if (dx) input_gradient(here, group, members, mine);
    }
    for (int64_t p : mine.panels)
      for (int64_t i = p * kTile; i < (p + 1) * kTile; ++i) {
        sum[i] += block_sum[i];
        block_sum[i] = 0;
      }
  }
}

template <class Tiles, class T>
FASTLOSS_AVX512 void LinearRun<Tiles, T>::pack_columns(int64_t strip, int64_t count, Scratch &mine) {
  for (int64_t s = 0; s < count; ++s) {
    const int64_t first = (strip + s) * kTile, exist = std::min(kTile, v - first);
    pack_left<Tiles>(w + first * args.ldw, args.ldw, exist, d, steps_d, mine.w.get() + s * steps_d * kBlock);
    for (int64_t r = 0; r < kTile; ++r)
      mine.bias[s * kTile + r] = r < exist ? bias_of(first + r) : args.softcap != 0 ? 0.f : map.nothing;
  }
}

// Product 1 and its exponentials: `count` strips against a group of panels. `numbered` is what `to` calls `strip`.
template <class Tiles, class T>
FASTLOSS_AVX512 void LinearRun<Tiles, T>::logits(int64_t strip, int64_t count, const int64_t *group, int64_t members,
                                                 const TokenSums &sums, const Store &to, int64_t numbered,
                                                 uint32_t *right, Scratch &mine) {
  if (args.softcap != 0) logits_of<true>(strip, count, group, members, sums, to, numbered, right, mine);
  else logits_of<false>(strip, count, group, members, sums, to, numbered, right, mine);
}

template <class Tiles, class T>
template <bool kSoftcap>
FASTLOSS_AVX512 void LinearRun<Tiles, T>::logits_of(int64_t strip, int64_t count, const int64_t *group, int64_t members,
                                                    const TokenSums &sums, const Store &to, int64_t numbered,
                                                    uint32_t *right, Scratch &mine) {
  Exponentials<Tiles, kSoftcap> work; // of the product before the one that is being made
  bool any = false;
  for (int64_t s = 0; s < count; ++s)
    for (int64_t step = 0; step < steps_d; step += kStepsInCache) {
      const int64_t steps = std::min(kStepsInCache, steps_d - step);
      for (int64_t m = 0; m < members; ++m) {
        // One buffer more than members: the product before must not be overwritten yet.
        const int64_t slot = steps_d > kStepsInCache ? (s * members + m) % (members + 1) : (s * members + m) % 2;
        float *product = mine.products.get() + slot * kProduct;
        Tiles::multiply(mine.w.get() + (s * steps_d + step) * kBlock,
                        x_right.get() + (group[m] * steps_d + step) * kBlock, steps, product, step > 0, work);
        if (any) {
          work.end(sums);
          any = false;
        }
        if (step + steps < steps_d) continue;
        work.bias = mine.bias.get() + s * kTile;
        work.first_column = (strip + s) * kTile;
        work.rows = std::min(kTile, v - work.first_column);
        work.token = group[m] * kTile;
        work.left = to.at(numbered + s, group[m], kPanelUnits);
        work.right = right ? right + (m * block_strips + s) * kPanelUnits : nullptr;
        work.begin(product, map, sums);
        any = true;
      }
    }
  while (work.pending()) work.two_rows();
  if (any) work.end(sums);
}

// Product 2, transposed: [32 of d][32 tokens] += w^T E.
template <class Tiles, class T>
FASTLOSS_AVX512 void LinearRun<Tiles, T>::input_gradient(int64_t count, const int64_t *group, int64_t members,
                                                         Scratch &mine) {
  for (int64_t j = 0; j < panels_d; ++j)
    for (int64_t m = 0; m < members; ++m) {
      const int64_t next = m + 1 < members ? group[m + 1] * panels_d + j : group[0] * panels_d + (j + 1) % panels_d;
      FetchProduct fetch{dx_sums.get() + next * kProduct};
      Tiles::multiply(mine.w_transposed.get() + j * count * kPanelUnits,
                      mine.exponentials.get() + m * block_strips * kPanelUnits, count * kPanelSteps,
                      dx_sums.get() + (group[m] * panels_d + j) * kProduct, true, fetch);
    }
}

// Tokens whose sum is out of range take their largest exponent as offset; their panels are cleared and listed.
template <class Tiles, class T> bool LinearRun<Tiles, T>::raise_offsets(Scratch &mine) {
  std::vector<int64_t> again;
  for (int64_t p : mine.panels) {
    bool any = false;
    for (int64_t i = p * kTile; i < std::min((p + 1) * kTile, tokens); ++i) {
      const bool fits = sum[i] >= kSmallestSum && sum[i] <= kLargestSum;
      if (fits || !std::isfinite(top[i])) continue;
      offset[i] += top[i];
      any = true;
    }
    if (!any) continue;
    again.push_back(p);
    clear_sums(p);
  }
  mine.panels = std::move(again);
  return !mine.panels.empty();
}

// Statistics, the one factor of each token, dx, and x times the factor.
template <class Tiles, class T> FASTLOSS_AVX512 void LinearRun<Tiles, T>::finish(int64_t panel) {
  const int64_t begin = panel * kTile;
  for (int64_t i = begin; i < begin + kTile; ++i) {
    factor[i] = own[i] = column[i] = 0;
    if (row[i] >= 0) finish_token(i, row[i]);
  }
  if (dx) store_dx(panel);
  if (dw) {
    const int64_t stride = panels * kPanelUnits;
    pack_scaled<Tiles>(x, args.ldx, row.data() + begin, factor.data() + begin, d, stride,
                       scaled_x.get() + panel * kPanelUnits);
  }
}

template <class Tiles, class T> FASTLOSS_AVX512 void LinearRun<Tiles, T>::finish_token(int64_t i, int64_t n) {
  const double away = double(args.softcap != 0 ? 1.f : args.scale) * shift;
  const double t = double(own_logit[i]) - offset[i], e_own = std::exp2(t), log_sum = std::log(double(sum[i]));
  const double margin = t * kLn2 - log_sum; // z_y - log sum of the rest
  const double rest = offset[i] * kLn2 + log_sum + away;
  // The statistics are consistent among each other: (target - max) - logsum is the margin, digit by digit.
  const float top_z = float((double(offset[i]) + top[i]) * kLn2 + away), ref = top_z == -kInfinity ? 0.f : top_z;
  const float own_z = float(own_logit[i] * kLn2 + away);
  const bool finite = std::isfinite(own_z) && std::isfinite(margin);
  float *stats = args.stats + n;
  stats[kMax * args.n] = top_z;
  stats[kLogSum * args.n] = float(finite ? double(own_z) - ref - margin : rest - ref);
  stats[kTarget * args.n] = own_z;
  if (with_sum) {
    const double dot_product = dot(x + n * args.ldx, weighted_w.data(), d);
    stats[kSumRow * args.n] = float(args.scale * (dot_product + weighted_bias) + (away - ref) * weight_total);
  }
  if (!args.epilogue) return;

  const double b = epilogue(kNll)[n], e = epilogue(kLse)[n], square = epilogue(kLseSq)[n];
  const double softplus = std::max(margin, 0.) + std::log1p(std::exp(-std::fabs(margin)));
  const double lse = sum[i] == 0 ? double(own_z) : rest + softplus;
  const double h = e + 2 * square * lse;
  const double miss = margin > 0 ? std::exp(-margin) / (1 + std::exp(-margin)) : 1 / (1 + std::exp(margin));
  const double cap = args.softcap != 0 ? own_logit[i] / map.log2_scale : 0, slope = args.scale * (1 - cap * cap);
  factor[i] = float((b + h) * args.scale / (e_own + sum[i]));
  own[i] = target[i] >= 0 ? float((h - (b + h) * miss) * slope) : 0.f;
  column[i] = with_sum ? epilogue(kSumWeight)[n] * args.scale : 0.f;
  if (args.margin_loss != kNoMarginLoss) {
    const double pull = b * margin_slope(args.margin_loss, args.margin_a, args.margin_b, margin);
    factor[i] = sum[i] == 0 ? 0.f : float(-pull * args.scale / sum[i]);
    own[i] = target[i] >= 0 ? float(pull * slope) : 0.f;
  }
}

// dx_i = a_i (sum of the products) + own_i w_y + s_i wbar
template <class Tiles, class T> FASTLOSS_AVX512 void LinearRun<Tiles, T>::store_dx(int64_t panel) {
  for (int64_t j = 0; j < d; j += 16)
    for (int64_t half = 0; half < 2; ++half) {
      const float *from = dx_sums.get() + (panel * panels_d + j / kTile) * kProduct + j % kTile * kTile + half * 16;
      __m512i rows[16];
      for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(from + i * kTile);
      transpose_units(rows);
      for (int lane = 0; lane < 16; ++lane) {
        const int64_t i = panel * kTile + half * 16 + lane, count = d - j;
        if (row[i] < 0) continue;
        __m512 result = _mm512_mul_ps(_mm512_castsi512_ps(rows[lane]), _mm512_set1_ps(factor[i]));
        if (target[i] >= 0)
          result = _mm512_fmadd_ps(_mm512_set1_ps(own[i]), load_some(w + target[i] * args.ldw + j, count), result);
        if (with_sum)
          result = _mm512_fmadd_ps(_mm512_set1_ps(column[i]), load_some(weighted_w.data() + j, count), result);
        store_some(dx + row[i] * d + j, result, count);
      }
    }
}

} // namespace fastloss::linear

#endif
