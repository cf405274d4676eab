// Multiplies by one number that is on the device, and does nothing, reads nothing, where that number is 1: the
// gradients that were made in the forward for an upstream gradient of 1 usually get just that, and asking the host
// would synchronise.
#include "cuda.h"

#include "common.cuh"
#include "row_stats.cuh"

#include <algorithm>

namespace fastloss {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(T *x, const int64_t n, const float *factor) {
  const float by = *factor;
  if (by == 1) return;
  constexpr int N = kWidth<T>;
  const int64_t stride = int64_t(gridDim.x) * kThreads, first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0;
  const int64_t vectors = aligned ? n / N : 0;
  uint4 *v = reinterpret_cast<uint4 *>(x);
  for (int64_t i = first; i < vectors; i += stride) {
    float f[N];
    uint4 raw = v[i];
    unpack<T>(raw, f);
#pragma unroll
    for (int k = 0; k < N; ++k) f[k] *= by;
    T scaled[N];
    for (int k = 0; k < N; ++k) store(scaled[k], f[k]);
    memcpy(&raw, static_cast<const void *>(scaled), 16);
    v[i] = raw;
  }
  for (int64_t i = vectors * N + first; i < n; i += stride) store(x[i], to_float(x[i]) * by);
}

template <class T> void launch_scale(void *x, int64_t n, const float *factor, int blocks, void *stream) {
  Launch l;
  l.grid = dim3(unsigned(blocks));
  l.block = dim3(kThreads);
  l.stream = static_cast<decltype(l.stream)>(stream);
  launch(l, scale_kernel<T>, static_cast<T *>(x), n, factor);
}

} // namespace

void scale_cuda(void *x, int dtype, int64_t n, const float *factor, int device, void *stream) {
  if (n == 0) return;
  const DeviceGuard guard(device);
  const int64_t wanted = (n + kThreads * 8 - 1) / (kThreads * 8);
  const int blocks = int(std::min<int64_t>(wanted, 8 * device_limits(device).multiprocessors));
  const auto scale = dtype == kFloat32   ? launch_scale<float>
                     : dtype == kFloat16 ? launch_scale<__half>
                                         : launch_scale<__nv_bfloat16>;
  scale(x, n, factor, blocks, stream);
}

} // namespace fastloss
