// docs/design.md, "Edges", on a GPU. An edge's dot product is a group of lanes with a 16-byte vector each; a row of the
// sum is threads with a vector of columns each, which go along the row's edges in their order. No shared memory, no
// atomics: every result has one writer and one order.
#include "cuda.h"
#include "row_stats.cuh"

namespace fastloss {
namespace {

constexpr int kThreads = 256;

// A vector of an operand's row from `column` on, at once where it is aligned; 0 beyond column d.
template <class T>
__device__ void columns_of(const T *row, int64_t column, int64_t d, bool aligned, float (&x)[kWidth<T>]) {
  const int64_t left = d - column;
  if (aligned && left >= kWidth<T>) {
    unpack<T>(__ldg(reinterpret_cast<const uint4 *>(row + column)), x);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) x[i] = i < left ? to_float(row[column + i]) : 0;
  }
}

template <class T> __device__ bool rows_aligned(const void *rows, int64_t ld) {
  return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && ld % kWidth<T> == 0;
}

template <class T> __global__ void __launch_bounds__(kThreads) edge_dots(const EdgeDot p, const int lanes) {
  constexpr int N = kWidth<T>;
  const int64_t edge = int64_t(blockIdx.x) * (kThreads / lanes) + threadIdx.x / lanes;
  const int lane = threadIdx.x % lanes;
  int64_t row = -1, column = -1;
  if (edge < p.edges) row = p.rows[edge], column = p.columns[edge];
  const bool known = row >= 0 && row < p.m && column >= 0 && column < p.n;
  float sum = 0;
  if (known) {
    const T *const a = static_cast<const T *>(p.q) + row * p.ldq, *const b =
                                                                      static_cast<const T *>(p.k) + column * p.ldk;
    const bool a_aligned = rows_aligned<T>(p.q, p.ldq), b_aligned = rows_aligned<T>(p.k, p.ldk);
#pragma unroll 2
    for (int64_t i = lane * N; i < p.d; i += lanes * N) {
      float x[N], y[N];
      columns_of(a, i, p.d, a_aligned, x);
      columns_of(b, i, p.d, b_aligned, y);
#pragma unroll
      for (int k = 0; k < N; ++k) sum = fmaf(x[k], y[k], sum);
    }
  }
  for (int distance = lanes / 2; distance; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  if (lane == 0 && edge < p.edges) p.dots[edge] = known ? sum : NAN;
}

template <class T> __global__ void __launch_bounds__(kThreads) edge_sums(const EdgeSum p) {
  constexpr int N = kWidth<T>;
  const int64_t vectors = (p.d + N - 1) / N, id = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = id / vectors, column = id % vectors * N;
  if (row >= p.m) return;
  const T *const x = static_cast<const T *>(p.x);
  const bool aligned = rows_aligned<T>(p.x, p.ldx);
  float sum[N] = {};
  const int64_t end = min(p.edges, p.pointer[row + 1]);
#pragma unroll 4
  for (int64_t e = max(int64_t(0), p.pointer[row]); e < end; ++e) {
    const int64_t source = p.source[e];
    const bool known = source >= 0 && source < p.n;
    const float weight = known ? p.weight[e] : NAN;
    float from[N];
    columns_of(x + (known ? source * p.ldx : 0), column, known ? p.d : column, aligned, from);
#pragma unroll
    for (int k = 0; k < N; ++k) sum[k] = fmaf(weight, from[k], sum[k]);
  }
  T *const to = static_cast<T *>(p.sums) + row * p.d + column;
  if (p.d - column >= N) {
    put(to, is_aligned(to), sum);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (column + k < p.d) store(to[k], sum[k]);
  }
}

Launch plan(int64_t blocks, void *stream) {
  if (blocks > INT32_MAX) throw std::runtime_error("edges on CUDA take at most 2^31 - 1 blocks");
  Launch l;
  l.grid = dim3(unsigned(blocks));
  l.block = dim3(kThreads);
  l.stream = static_cast<decltype(l.stream)>(stream);
  return l;
}

template <class T> void launch_dots(const EdgeDot &p, void *stream) {
  int lanes = 1; // as many as have a vector to read
  while (lanes < 32 && lanes * kWidth<T> < p.d) lanes *= 2;
  const int64_t edges = kThreads / lanes;
  launch(plan((p.edges + edges - 1) / edges, stream), edge_dots<T>, p, lanes);
}

template <class T> void launch_sums(const EdgeSum &p, void *stream) {
  const int64_t vectors = (p.d + kWidth<T> - 1) / kWidth<T>;
  launch(plan((p.m * vectors + kThreads - 1) / kThreads, stream), edge_sums<T>, p);
}

} // namespace

void edge_dot_cuda(const EdgeDot &p, int device, void *stream) {
  if (p.edges == 0) return;
  const DeviceGuard guard(device);
  if (p.dtype == kFloat32) launch_dots<float>(p, stream);
  else if (p.dtype == kFloat16) launch_dots<__half>(p, stream);
  else launch_dots<__nv_bfloat16>(p, stream);
}

void edge_sum_cuda(const EdgeSum &p, int device, void *stream) {
  if (p.m == 0 || p.d == 0) return;
  const DeviceGuard guard(device);
  if (p.dtype == kFloat32) launch_sums<float>(p, stream);
  else if (p.dtype == kFloat16) launch_sums<__half>(p, stream);
  else launch_sums<__nv_bfloat16>(p, stream);
}

} // namespace fastloss
