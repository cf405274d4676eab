// What the two row kernels share: how a row is dealt to blocks and threads, how it is streamed, how statistics merge.
#pragma once
#include "common.cuh"
#include "fastloss.h"
#include "margin_loss.h"

namespace fastloss {

constexpr int kMaxThreads = 512, kMaxWarps = kMaxThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f, kInf = INFINITY;
template <class T> constexpr int kWidth = 16 / sizeof(T); // columns in a 16-byte vector

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void store(float &to, float x) { to = x; }
__device__ inline void store(__half &to, float x) { to = __float2half_rn(x); }
__device__ inline void store(__nv_bfloat16 &to, float x) { to = __float2bfloat16_rn(x); }

template <class T> __device__ void unpack(const uint4 &raw, float (&x)[kWidth<T>]) {
  T t[kWidth<T>];
  memcpy(static_cast<void *>(t), &raw, 16);
#pragma unroll
  for (int k = 0; k < kWidth<T>; ++k) x[k] = to_float(t[k]);
}

// bf16 is the upper half of a float: one instruction a number, where the conversion makes two.
template <> __device__ inline void unpack<__nv_bfloat16>(const uint4 &raw, float (&x)[8]) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    x[2 * k] = __uint_as_float(words[k] << 16);
    x[2 * k + 1] = __uint_as_float(words[k] & 0xffff0000u);
  }
}

// A row is [head | vectors | tail]. The vectors are 16-byte aligned; every block has a slice of them, thread t of the
// block those at t, t + threads, ... Head, tail and the columns of the vector that holds the target are single columns,
// at most one a thread of the first block: the loops over vectors then never ask which column is the target.
struct Slice {
  int count;  // vectors of this block
  int column; // where the first of them starts
  int skip;   // the one with the target, counted from the first; outside [0, count) if it is not in this slice
  int single; // the column that this thread takes on its own, or -1
};

template <class T> __device__ Slice slice_of(const T *row, int v, int target, int slices, int rank) {
  constexpr int N = kWidth<T>;
  const int t = threadIdx.x, misaligned = int(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
  const int head = min(v, (N - misaligned) % N), vectors = (v - head) / N, tail = v - head - vectors * N;
  const int each = (vectors + slices - 1) / slices, first = min(vectors, rank * each);
  const int holder = target >= head && target < v - tail ? (target - head) / N : -1;
  Slice s{min(vectors - first, each), head + first * N, holder < 0 ? -1 : holder - first, -1};
  if (rank == 0) {
    if (t < head) s.single = t;
    else if (t < head + tail) s.single = t + vectors * N;
    else if (t < head + tail + N && holder >= 0) s.single = t - tail + holder * N;
  }
  return s;
}

// Calls f(vector, index) for every vector of this thread but `skip`. Several loads are in flight before the first is
// used, and a thread has read its vectors before it may overwrite them.
template <int FLIGHT, class F> __device__ void stream(const uint4 *from, int count, int skip, F f) {
  const int step = blockDim.x;
  for (int i = threadIdx.x; i < count; i += FLIGHT * step) {
    uint4 raw[FLIGHT];
#pragma unroll
    for (int k = 0; k < FLIGHT; ++k)
      if (i + k * step < count) raw[k] = load_stream(from + i + k * step);
#pragma unroll
    for (int k = 0; k < FLIGHT; ++k)
      if (i + k * step < count && i + k * step != skip) f(raw[k], i + k * step);
  }
}

// The same by way of shared memory, where the vectors stay: kAhead of them in flight without a register. A thread only
// reads what it copied itself, so there is no barrier.
template <class F> __device__ void stream_keeping(uint4 *kept, const uint4 *from, int count, int skip, F f) {
  constexpr int kAhead = 8;
  const int step = blockDim.x;
  int ahead = threadIdx.x;
  const uint4 *source = from + ahead, *here = kept + ahead;
  SharedAddress to = shared_address(kept + ahead);
  auto copy = [&] {
    if (ahead < count) cp_async16(to, source);
    cp_async_commit();
    ahead += step;
    source += step;
    to += step * 16;
  };
  for (int k = 0; k < kAhead; ++k) copy();
  for (int i = threadIdx.x; i < count; i += step, here += step) {
    copy();
    cp_async_wait<kAhead>();
    if (i != skip) f(*here, i);
  }
}

// A vector of gradients, to a row that may be aligned otherwise than the logits.
template <class T> __device__ void put(T *to, bool aligned, const float (&x)[kWidth<T>]) {
  T t[kWidth<T>];
#pragma unroll
  for (int k = 0; k < kWidth<T>; ++k) store(t[k], x[k]);
  if (aligned) {
    uint4 raw;
    memcpy(&raw, static_cast<const void *>(t), 16);
    __stcs(reinterpret_cast<uint4 *>(to), raw);
  } else {
#pragma unroll
    for (int k = 0; k < kWidth<T>; ++k) to[k] = t[k];
  }
}
template <class T> __device__ bool is_aligned(const T *p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// ---- the target of a row
struct Target {
  int column;   // or -1
  float logit;  // what stands for the target's logit while column is -1: -inf, and NaN if the target is out of range
  bool ignored; // the row takes no part
};

__device__ inline Target target_of(const RowStats &p, int64_t row) {
  if (!p.target) return {-1, -kInf, false};
  const int64_t y = p.target[row];
  if (y == p.ignore_index) return {-1, 0, true};
  if (y < 0 || y >= p.v) return {-1, NAN, false};
  return {int(y), 0, false};
}

// The gradient was made in the forward for an upstream gradient of 1, and that is what came: known without a host sync.
__device__ inline bool already_there(const RowStats &p) { return p.upstream && *p.upstream == 1; }

// Zeros for a row that is ignored; its logits are not read.
template <class T> __device__ void ignore_row(const RowStats &p, int64_t row, int slices, int rank) {
  if (p.mode != kGradient && rank == 0 && threadIdx.x < kNumStats) p.stats[threadIdx.x * p.n + row] = 0;
  if (p.mode != kGradient && rank == 0 && threadIdx.x == 0 && (p.want & kArgmax)) p.argmax[row] = -1;
  if (p.mode == kStats) return;
  T *g = static_cast<T *>(p.dlogits) + row * p.ld_out;
  const Slice s = slice_of(g, int(p.v), -1, slices, rank);
  const float zero[kWidth<T>] = {};
  for (int i = threadIdx.x; i < s.count; i += blockDim.x) put(g + s.column + i * kWidth<T>, true, zero);
  if (s.single >= 0) store(g[s.single], 0);
}

// ---- merging: over a warp by shuffles, then over the warps of the block and of its cluster
template <class S> __device__ S shuffle(const S &s, int distance) {
  float in[sizeof(S) / 4], out[sizeof(S) / 4];
  S result;
  memcpy(in, &s, sizeof s);
#pragma unroll
  for (unsigned k = 0; k < sizeof(S) / 4; ++k) out[k] = __shfl_xor_sync(kAllLanes, in[k], distance);
  memcpy(&result, out, sizeof s);
  return result;
}

template <class S> __device__ S merge_warp(S s) {
#pragma unroll 1
  for (int distance = 16; distance; distance /= 2) s = merge(s, shuffle(s, distance));
  return s;
}

// Every thread gets the result, and every warp computes it in the same order. One barrier. Until the cluster's next
// barrier no block may write `part` again or exit.
template <class S> __device__ S merge_blocks(S s, const S &none, S *part, int slices) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  s = merge_warp(s);
  if (lane == 0) part[threadIdx.x / 32] = s;
  if (slices > 1) cluster_sync();
  else __syncthreads();
  S all = none;
#pragma unroll 1
  for (int i = lane; i < slices * warps; i += 32) all = merge(all, *cluster_map(part + i % warps, i / warps));
  return merge_warp(all);
}

// fmaxf drops a NaN, the sum of exponentials does not.
__device__ inline float with_nan(float max, float logsum) { return logsum != logsum && max != kInf ? NAN : max; }

// ---- the coefficients of cross entropy
struct CrossEntropy {
  float own, rest;
};

// The margin form: d = z_y - log-sum-exp of the rest, nothing cancels when p_y -> 1.
__device__ inline CrossEntropy hard_coefficients(const RowStats &p, int64_t row, float max, float logsum, float logit) {
  const float b = p.row[kNll * p.n + row], e = p.row[kLse * p.n + row], t = p.row[kLseSq * p.n + row];
  const float d = logsum == -kInf ? logit + kInf : (logit - max) - logsum;
  if (p.margin_loss != kNoMarginLoss) {
    const float own = b * float(margin_slope(p.margin_loss, p.margin_a, p.margin_b, d));
    return {own, -own};
  }
  const float lse = d > 0 ? logit + log1pf(expf(-d)) : (max + logsum) + log1pf(expf(d));
  const float h = e + 2 * t * lse, rest = (b + h) / (1 + expf(d));
  return {h - rest, rest};
}

} // namespace fastloss
