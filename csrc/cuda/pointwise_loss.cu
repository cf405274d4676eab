// Pointwise losses on a GPU: every operand is read once and every result written once, 16 bytes at a time. The loss is
// summed in a fixed order, by thread, block and grid in turn, so that two runs are bit-equal.
#include "cuda.h"

#include "common.cuh"
#include "row_stats.cuh"

#include <algorithm>

namespace fastloss {
namespace {

constexpr int kThreads = 256;
constexpr int kWeightedBce = 3; // beyond PointwiseKind

__device__ float element(const Elements &e, int64_t i) {
  if (e.dtype == kFloat32) return static_cast<const float *>(e.data)[i];
  if (e.dtype == kFloat16) return to_float(static_cast<const __half *>(e.data)[i]);
  return to_float(static_cast<const __nv_bfloat16 *>(e.data)[i]);
}

// An operand that is repeated. `inverse` is 1 / period from the host: a division of 64 bits is a call on the device.
struct Repeated {
  Elements elements;
  double inverse;
};

Repeated repeated(const Elements &e) { return {e, 1 / double(e.data ? e.period : 1)}; }

// The place of element i, or one period further: up to 2^52 elements the quotient is right or one too small.
__device__ int64_t place(const Repeated &r, int64_t i) {
  return i - int64_t(double(i) * r.inverse) * r.elements.period;
}

// The weight k elements after a place, k small.
__device__ float weight_at(const Repeated &r, int64_t place, int k) {
  if (!r.elements.data) return 1;
  place += k;
  while (place >= r.elements.period) place -= r.elements.period;
  return element(r.elements, place);
}

// The forms of csrc/cpu/pointwise_loss.inc, in which nothing cancels, by one division.
struct Slot {
  float value, slope;
};

__device__ Slot bce(float x, float t, float positive, float c) {
  const float e = expf(-fabsf(x)), inverse = 1 / ((1 + e) * (2 + e));
  const float y = e * (1 + e) * inverse, sigmoid = e * (2 + e) * inverse, square = y * y;
  float series = fmaf(0x1.20822cp-3f, square, 0x1.1e532ep-3f); // atanh(y) / y, csrc/cpu/simd_log.h
  series = fmaf(fmaf(fmaf(series, square, 0x1.99dacp-3f), square, 0x1.5554ep-2f), square, 1.f);
  const float linear = x < 0 ? -positive : 1 - t, part = c * sigmoid;
  const float value = fmaf(linear, x, c * (2 * y * series));
  return {x == -kInf ? NAN : value, linear + (x < 0 ? part : -part)}; // at -inf as in torch: inf - inf
}

template <int KIND> __device__ Slot slot(float x, float t, float w, float p) {
  if (KIND == kKlDiv) return {t * ((t == 0 ? 0 : logf(t)) - x), -t};
  if (KIND == kKlDivLogTarget) {
    const float q = expf(t);
    return {q * (t - x), -q};
  }
  if (KIND == kBceWithLogits) return bce(x, t, t, 1);
  const Slot s = bce(x, t, p * t, fmaf(p - 1, t, 1.f));
  return {w * s.value, w * s.slope};
}

// N elements from a multiple of N, where the memory is aligned to 16 bytes.
template <class T, int N> __device__ void load_group(const Elements &from, int64_t first, float (&x)[N]) {
  const uint4 *p = reinterpret_cast<const uint4 *>(static_cast<const T *>(from.data) + first);
#pragma unroll
  for (int part = 0; part < N / kWidth<T>; ++part) {
    float some[kWidth<T>];
    unpack<T>(load_stream(p + part), some);
#pragma unroll
    for (int k = 0; k < kWidth<T>; ++k) x[part * kWidth<T> + k] = some[k];
  }
}

template <class T, int N> __device__ void store_group(const Elements &to, int64_t first, const float (&x)[N]) {
  T *p = static_cast<T *>(to.data) + first;
#pragma unroll
  for (int part = 0; part < N / kWidth<T>; ++part) {
    float some[kWidth<T>];
#pragma unroll
    for (int k = 0; k < kWidth<T>; ++k) some[k] = x[part * kWidth<T> + k];
    put<T>(p + part * kWidth<T>, true, some);
  }
}

// The sum over a block, by thread 0. Halves are added in a fixed order.
__device__ double block_sum(double mine) {
  SHARED_ARRAY(double, sums, [kThreads]);
  sums[threadIdx.x] = mine;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return threadIdx.x == 0 ? sums[0] : 0;
}

// T: input and its gradient; U: target and the values.
template <class T, class U, int KIND>
__global__ void __launch_bounds__(kThreads)
    pointwise_kernel(const __grid_constant__ PointwiseLoss p, const __grid_constant__ Repeated weight,
                     const __grid_constant__ Repeated pos_weight, const bool aligned) {
  constexpr bool weighted = KIND == kWeightedBce;
  const bool one_upstream = p.upstream.data && p.upstream.period == 1;
  const float upstream = one_upstream ? element(p.upstream, 0) : 1;
  if (p.unless_one && upstream == 1) return;
  const float factor = float(upstream * p.share);
  constexpr int N = kWidth<T>;
  const int64_t stride = int64_t(gridDim.x) * kThreads, thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t groups = aligned ? p.n / N : 0;
  double sum = 0;
  for (int64_t group = thread; group < groups; group += stride) {
    const int64_t first = group * N;
    float x[N], t[N], values[N], slopes[N], part = 0;
    load_group<T, N>(p.input, first, x);
    load_group<U, N>(p.target, first, t);
    const int64_t w_at = weighted ? place(weight, first) : 0, p_at = weighted ? place(pos_weight, first) : 0;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const Slot s = slot<KIND>(x[k], t[k], weighted ? weight_at(weight, w_at, k) : 1,
                                weighted ? weight_at(pos_weight, p_at, k) : 1);
      values[k] = s.value, slopes[k] = s.slope * factor, part += s.value;
    }
    sum += part;
    if (p.values.data) store_group<U, N>(p.values, first, values);
    if (!p.dinput.data) continue;
    if (p.upstream.data && !one_upstream)
#pragma unroll
      for (int k = 0; k < N; ++k) slopes[k] *= element(p.upstream, first + k);
    store_group<T, N>(p.dinput, first, slopes);
  }
  for (int64_t i = groups * N + thread; i < p.n; i += stride) {
    const float w = weighted ? weight_at(weight, place(weight, i), 0) : 1;
    const float q = weighted ? weight_at(pos_weight, place(pos_weight, i), 0) : 1;
    const Slot s = slot<KIND>(element(p.input, i), element(p.target, i), w, q);
    sum += s.value;
    if (p.values.data) store(static_cast<U *>(p.values.data)[i], s.value);
    if (!p.dinput.data) continue;
    const float own = p.upstream.data && !one_upstream ? element(p.upstream, i) : 1;
    store(static_cast<T *>(p.dinput.data)[i], s.slope * factor * own);
  }
  if (!p.loss) return;
  const double total = block_sum(sum);
  if (threadIdx.x == 0) p.partial[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads)
    sum_kernel(const double *partial, const int count, const double share, float *loss) {
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  const double total = block_sum(sum);
  if (threadIdx.x == 0) *loss = float(total * share);
}

bool is_aligned(const Elements &e) { return reinterpret_cast<uintptr_t>(e.data) % 16 == 0; }

Launch launch_of(int blocks, void *stream) {
  Launch l;
  l.grid = dim3(unsigned(blocks));
  l.block = dim3(kThreads);
  l.stream = static_cast<decltype(l.stream)>(stream);
  return l;
}

template <class T, class U> void launch_pointwise(const PointwiseLoss &p, const Launch &l) {
  const auto kernel = p.kind == kKlDiv                     ? pointwise_kernel<T, U, kKlDiv>
                      : p.kind == kKlDivLogTarget          ? pointwise_kernel<T, U, kKlDivLogTarget>
                      : p.weight.data || p.pos_weight.data ? pointwise_kernel<T, U, kWeightedBce>
                                                           : pointwise_kernel<T, U, kBceWithLogits>;
  launch(l, kernel, p, repeated(p.weight), repeated(p.pos_weight),
         is_aligned(p.input) && is_aligned(p.target) && is_aligned(p.values) && is_aligned(p.dinput));
}

} // namespace

void pointwise_loss_cuda(const PointwiseLoss &p, int device, void *stream) {
  if (p.target.dtype != p.input.dtype && p.target.dtype != kFloat32)
    throw std::runtime_error("the CUDA kernel takes targets in float32 or in the dtype of the input");
  if (p.n == 0 && !p.loss) return;
  const DeviceGuard guard(device);
  const int64_t wanted = std::max<int64_t>(1, (p.n + kThreads * 8 - 1) / (kThreads * 8));
  const int blocks = int(std::min<int64_t>({wanted, 8 * device_limits(device).multiprocessors, kMostPartials}));
  const bool wide = p.target.dtype == kFloat32;
  const auto launch_some = p.input.dtype == kFloat32 ? launch_pointwise<float, float>
                           : p.input.dtype == kFloat16
                               ? wide ? launch_pointwise<__half, float> : launch_pointwise<__half, __half>
                           : wide ? launch_pointwise<__nv_bfloat16, float>
                                  : launch_pointwise<__nv_bfloat16, __nv_bfloat16>;
  launch_some(p, launch_of(blocks, stream));
  if (p.loss) launch(launch_of(1, stream), sum_kernel, static_cast<const double *>(p.partial), blocks, p.share, p.loss);
}

} // namespace fastloss
