// What the two region kernels share: how values are read, and what each is made of. All of it comes from
// s = sigmoid(-|x|), so that neither p nor 1 - p is ever a difference.
#pragma once
#include "region_stats.h"
#include "row_stats.cuh"

namespace fastloss {

constexpr float kFar = 126; // sigmoid(-126) is 0 in fp32, and 0 * 126 is not 0 * inf

__device__ inline float to_float(uint8_t x) { return x; }

template <int BYTES> struct Word;
template <> struct Word<4> {
  using Type = unsigned;
};
template <> struct Word<8> {
  using Type = uint2;
};
template <> struct Word<16> {
  using Type = uint4;
};

// The values of one thread's step: N in a row, at once where they are aligned, else one by one; 0 beyond `count`.
template <class U, int N> __device__ void load_values(const U *from, bool aligned, int count, float (&x)[N]) {
  constexpr int kBytes = N * sizeof(U) < 16 ? N * sizeof(U) : 16;
  using W = typename Word<kBytes>::Type;
  U t[N];
  if (aligned && count >= N) {
    W raw[N * sizeof(U) / kBytes];
#pragma unroll
    for (int k = 0; k < int(N * sizeof(U) / kBytes); ++k) raw[k] = reinterpret_cast<const W *>(from)[k];
    memcpy(static_cast<void *>(t), raw, sizeof t);
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] = to_float(t[k]);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] = k < count ? to_float(from[k]) : 0;
  }
}

template <class U, int N> __device__ bool are_aligned(const U *p) {
  return reinterpret_cast<uintptr_t>(p) % (N * sizeof(U) < 16 ? N * sizeof(U) : 16) == 0;
}

__device__ inline float at_most(float x, float limit) { return x > limit ? limit : x; } // NaN stays

struct Sigmoid {
  float p, q, slope; // sigmoid(x), sigmoid(-x), their product
};

__device__ inline Sigmoid sigmoid_of(float x) {
  const float e = expf(-at_most(fabsf(x), kFar)), large = __fdividef(1, 1 + e), small = e * large;
  return {x < 0 ? small : large, x < 0 ? large : small, small * large};
}

// What one value is made of. `own` is the p that the confusion matrix is made of, `plain` sigmoid(x).
struct Element {
  float x, positive, negative, counts; // t, 1 - t and 1; 0 where the value does not count
  Sigmoid own, plain;
};

template <bool RICH> __device__ Element element_of(const RegionStats &p, float x, float t, bool counts) {
  Element it;
  it.counts = counts ? 1 : 0;
  it.x = counts ? x : 0; // a select, since what does not count may be NaN
  it.positive = counts ? t : 0;
  it.negative = it.counts - it.positive;
  it.own = RICH && (p.want & kRegionProbabilities) ? Sigmoid{it.x, 1 - it.x, 1} : sigmoid_of(it.x);
  it.plain = it.own;
  if (RICH && (p.want & kRegionSharp)) {
    const Sigmoid sharp = sigmoid_of(0.5f * p.sharpness * (it.own.p - it.own.q));
    it.own = {sharp.p, sharp.q, p.sharpness * sharp.slope * it.own.slope};
  }
  return it;
}

// p - t, without cancellation for a t of 0 or 1.
__device__ inline float error_of(const Element &it, const Sigmoid &of) {
  return of.p * it.negative - of.q * it.positive;
}

// The values of one region that this block works on.
template <class T, class U> struct Work {
  static constexpr int N = kWidth<T>;
  int64_t region, first, end; // first is a multiple of N
  const T *logits;
  const U *target;
  const uint8_t *mask;
  bool logits_aligned, target_aligned, mask_aligned;

  __device__ Work(const RegionStats &p, int slices) {
    const int64_t slice = blockIdx.x % slices, steps = (p.size + N - 1) / N, each = (steps + slices - 1) / slices * N;
    region = blockIdx.x / slices;
    first = min(p.size, slice * each), end = min(p.size, first + each);
    logits = static_cast<const T *>(p.logits) + region * p.size;
    target = static_cast<const U *>(p.target) + region * p.size;
    mask = p.mask ? p.mask + region / p.mask_share * p.size : nullptr;
    logits_aligned = are_aligned<T, N>(logits);
    target_aligned = are_aligned<U, N>(target);
    mask_aligned = are_aligned<uint8_t, N>(mask);
  }

  // Calls f(k, element) for the N values from i on, as many of them as there are.
  template <bool RICH, class F> __device__ void step(const RegionStats &p, int64_t i, F f) const {
    const int count = int(min(int64_t(N), end - i));
    float x[N], t[N], m[N];
    load_values<T, N>(logits + i, logits_aligned, count, x);
    load_values<U, N>(target + i, target_aligned, count, t);
    if (mask) load_values<uint8_t, N>(mask + i, mask_aligned, count, m);
#pragma unroll
    for (int k = 0; k < N; ++k) f(k, element_of<RICH>(p, x[k], t[k], k < count && (!mask || m[k] > 0)));
  }
};

} // namespace fastloss
