// The region contract of docs/design.md on a GPU: a region is dealt to `slices` blocks, each leaves its sums, and the
// caller adds them up in double. The gradient needs no sum at all.
#include "cuda.h"
#include "region_stats.cuh"

#include <algorithm>

namespace fastloss {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

struct Sums {
  float value[kNumRegionStats];
};

template <bool RICH> __device__ void fold(const RegionStats &p, const Element &it, Sums &sums) {
  float *s = sums.value;
  s[kRegionCount] += it.counts;
  s[kLabelled] += it.positive;
  s[kTruePositive] = fmaf(it.own.p, it.positive, s[kTruePositive]);
  s[kFalsePositive] = fmaf(it.own.p, it.negative, s[kFalsePositive]);
  s[kFalseNegative] = fmaf(it.own.q, it.positive, s[kFalseNegative]);
  s[kTrueNegative] = fmaf(it.own.q, it.negative, s[kTrueNegative]);
  if (!RICH) return;
  if (p.want & kRegionSquares) {
    const float error = error_of(it, it.own);
    s[kSquaredError] = fmaf(error, error, s[kSquaredError]);
    s[kLabelledSquare] = fmaf(it.positive, it.positive, s[kLabelledSquare]);
  }
  if (p.want & (kRegionCrossEntropy | kRegionEntropy)) {
    const float size = fabsf(it.x), near = at_most(size, kFar), log1p = log1pf(expf(-near));
    const float wrong = it.x < 0 ? it.positive : it.negative; // 0 * inf where the logit is on the right side
    if (p.want & kRegionCrossEntropy) s[kCrossEntropy] += fmaf(it.counts, log1p, wrong == 0 ? 0 : size * wrong);
    if (p.want & kRegionEntropy) s[kBinaryEntropy] += it.counts * fmaf(it.x < 0 ? it.plain.p : it.plain.q, near, log1p);
  }
}

template <class T, class U, bool RICH>
__global__ void __launch_bounds__(kThreads) region_sums(const RegionStats p, const int slices) {
  SHARED_ARRAY(Sums, part, [kWarps]);
  constexpr int N = kWidth<T>, kNumbers = RICH ? kNumRegionStats : kSquaredError;
  const Work<T, U> work(p, slices);
  const int64_t stride = int64_t(blockDim.x) * N;
  Sums all{};
  for (int64_t i = work.first + threadIdx.x * N; i < work.end; i += stride)
    work.template step<RICH>(p, i, [&](int, const Element &it) { fold<RICH>(p, it, all); });
#pragma unroll
  for (int k = 0; k < kNumbers; ++k)
    for (int distance = 16; distance; distance /= 2) all.value[k] += __shfl_xor_sync(kAllLanes, all.value[k], distance);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = all;
  __syncthreads();
  if (threadIdx.x < kNumRegionStats) {
    double sum = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += part[warp].value[threadIdx.x];
    p.stats[(int64_t(threadIdx.x) * slices + blockIdx.x % slices) * p.n + work.region] = float(sum);
  }
}

template <class T, class U, bool RICH>
__global__ void __launch_bounds__(kThreads) region_gradient(const RegionStats p, const int slices) {
  constexpr int N = kWidth<T>;
  const Work<T, U> work(p, slices);
  T *const out = static_cast<T *>(p.dlogits) + work.region * p.size;
  const bool aligned = is_aligned(out);
  float coef[kNumRegionCoefs];
#pragma unroll
  for (int k = 0; k < kNumRegionCoefs; ++k) coef[k] = p.coef[k * p.n + work.region];
  for (int64_t i = work.first + threadIdx.x * N; i < work.end; i += int64_t(blockDim.x) * N) {
    float d[N];
    work.template step<RICH>(p, i, [&](int k, const Element &it) {
      float g = fmaf(coef[kOnPositive], it.positive, coef[kOnNegative] * it.negative);
      if (RICH && (p.want & kRegionSquares)) g = fmaf(coef[kOnSquare], error_of(it, it.own), g);
      g *= it.own.slope;
      if (RICH && (p.want & kRegionCrossEntropy)) g = fmaf(coef[kOnCrossEntropy], error_of(it, it.plain), g);
      if (RICH && (p.want & kRegionEntropy)) {
        const float near = at_most(fabsf(it.x), kFar);
        g -= coef[kOnEntropy] * (it.x < 0 ? -near : near) * it.plain.slope;
      }
      d[k] = it.counts > 0 ? g : 0; // whatever the coefficients are
    });
    if (work.end - i >= N) {
      put(out + i, aligned, d);
    } else {
#pragma unroll
      for (int k = 0; k < N; ++k)
        if (i + k < work.end) store(out[i + k], d[k]);
    }
  }
}

template <class T, class U> void launch_regions(const RegionStats &p, int slices, void *stream) {
  const int64_t steps = (p.size + kWidth<T> - 1) / kWidth<T> / slices;
  Launch l;
  l.grid = dim3(unsigned(p.n * slices));
  l.block = dim3(steps >= kThreads ? kThreads : steps >= 64 ? 64 : 32);
  l.stream = static_cast<decltype(l.stream)>(stream);
  if (p.coef) launch(l, p.want ? region_gradient<T, U, true> : region_gradient<T, U, false>, p, slices);
  else launch(l, p.want ? region_sums<T, U, true> : region_sums<T, U, false>, p, slices);
}

template <class T> void launch_regions(const RegionStats &p, int slices, void *stream) {
  if (p.target_dtype == kByte) launch_regions<T, uint8_t>(p, slices, stream);
  else if (p.target_dtype == kFloat32) launch_regions<T, float>(p, slices, stream);
  else launch_regions<T, T>(p, slices, stream);
}

} // namespace

void region_stats_cuda(const RegionStats &p, int slices, int device, void *stream) {
  if (p.n == 0 || p.size == 0) return;
  if (p.n > INT32_MAX / slices)
    throw std::runtime_error("region_stats on CUDA takes at most 2^31 - 1 blocks of regions");
  const DeviceGuard guard(device);
  if (p.dtype == kFloat32) launch_regions<float>(p, slices, stream);
  else if (p.dtype == kFloat16) launch_regions<__half>(p, slices, stream);
  else launch_regions<__nv_bfloat16>(p, slices, stream);
}

} // namespace fastloss
