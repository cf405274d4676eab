// The row kernel for a hard target and nothing else: one pass for max and sum of exponentials, one for the gradient.
// A cluster of blocks owns a row (below sm_90 a block does). Every block keeps its slice of the row in shared memory,
// the blocks swap (max, sum) through distributed shared memory, and each writes the gradient of its slice.
#pragma once
#include "row_stats.cuh"

namespace fastloss {

// Max of the columns seen so far, and their sum of 2^(z log2e - shift(max)). The rounding of the shift is one factor
// for the whole row, known exactly, so that an offset of the logits costs no accuracy and a column only one fma.
struct Soft {
  float max, sum;
};

__device__ inline float shift(float max) { return max == -kInf ? 0 : __fmul_rn(max, kLog2e); }
__device__ inline float shift_error(float max) { return max == -kInf ? 0 : fmaf(max, kLog2e, -shift(max)); }
__device__ inline float power(float z, float shift) { return exp2_approx(fmaf(z, kLog2e, -shift)); }

// The factor from one max to a larger one.
__device__ inline float rescale(float from, float to) {
  return from == to ? 1 : exp2_approx(__fmul_rn(from, kLog2e) - __fmul_rn(to, kLog2e));
}

__device__ inline Soft merge(const Soft &a, const Soft &b) {
  const bool first = a.max >= b.max;
  const Soft high = first ? a : b, low = first ? b : a;
  return {high.max, fmaf(low.sum, rescale(low.max, high.max), high.sum)};
}

template <int N> __device__ Soft fold(const Soft &seen, const float (&z)[N]) {
  float max = seen.max, sum = 0;
#pragma unroll
  for (int k = 0; k < N; ++k) max = fmaxf(max, z[k]);
  const float by = shift(max);
#pragma unroll
  for (int k = 0; k < N; ++k) sum += power(z[k], by);
  return {max, fmaf(seen.sum, rescale(seen.max, max), sum)};
}

template <class T, int MODE, bool KEEP>
__global__ void __launch_bounds__(kMaxThreads)
    row_stats_lean(const RowStats p, const int64_t first_row, const int slices) {
  SHARED_DYNAMIC(uint4, kept);
  SHARED_ARRAY(Soft, part, [kMaxWarps]);
  constexpr int N = kWidth<T>;
  if (MODE == kGradient && already_there(p)) return;
  const int rank = blockIdx.x % slices;
  const int64_t row = first_row + blockIdx.x / slices;
  Target target = target_of(p, row);
  if (target.ignored) return ignore_row<T>(p, row, slices, rank); // the whole cluster leaves

  const T *z = static_cast<const T *>(p.logits) + row * p.ld;
  const Slice s = slice_of(z, int(p.v), target.column, slices, rank);
  const uint4 *vectors = reinterpret_cast<const uint4 *>(z + s.column);
  // Before any gradient is written: dlogits may be the logits.
  const float single = s.single >= 0 ? to_float(z[s.single]) : 0;

  float max, own, factor; // of the gradient: own at the target, factor 2^(z log2e - shift(max)) elsewhere
  if (MODE == kGradient) {
    max = p.stats[kMax * p.n + row];
    const float logsum = p.stats[kLogSum * p.n + row];
    own = p.row[kOwn * p.n + row];
    factor = p.row[kRest * p.n + row] * (logsum == -kInf ? 0 : expf(-logsum) * exp2f(-shift_error(max)));
    if (target.column < 0) factor += target.logit == -kInf ? 0 : NAN;
  } else {
    if (target.column >= 0) target.logit = to_float(z[target.column]);
    const Soft none{-kInf, 0};
    Soft soft = none;
    auto seen = [&](const uint4 &raw, int) {
      float x[N];
      unpack<T>(raw, x);
      soft = fold(soft, x);
    };
    if (KEEP) stream_keeping(kept, vectors, s.count, s.skip, seen);
    else stream<4>(vectors, s.count, s.skip, seen);
    if (s.single >= 0 && s.single != target.column) {
      const float x[1] = {single};
      soft = fold(soft, x);
    }
    soft = merge_blocks(soft, none, part, slices);
    if (slices > 1)
      cluster_arrive_relaxed(); // no block leaves while another still reads its part: the wait is at the end

    max = soft.max;
    const float logsum = logf(soft.sum) - shift_error(max) * kLn2;
    if (rank == 0 && threadIdx.x < kNumStats) {
      const int k = threadIdx.x;
      p.stats[k * p.n + row] = k == kMax      ? with_nan(max, logsum)
                               : k == kLogSum ? logsum
                               : k == kTarget ? target.logit
                                              : 0;
    }
    if (MODE == kBoth) {
      const CrossEntropy c = hard_coefficients(p, row, max, logsum, target.logit);
      own = c.own;
      factor = c.rest * (soft.sum == 0 ? 0 : 1 / soft.sum);
    }
  }

  if (MODE != kStats) {
    T *g = static_cast<T *>(p.dlogits) + row * p.ld_out;
    const bool aligned = is_aligned(g + s.column);
    const float by = shift(max);
    auto differentiate = [&](const uint4 &raw, T *to) {
      float x[N];
      unpack<T>(raw, x);
#pragma unroll
      for (int k = 0; k < N; ++k) x[k] = factor * power(x[k], by);
      put(to, aligned, x);
    };
    if (KEEP) {
      T *to = g + s.column + threadIdx.x * N;
      const uint4 *from = kept + threadIdx.x;
      for (int i = threadIdx.x; i < s.count; i += blockDim.x, to += blockDim.x * N, from += blockDim.x)
        if (i != s.skip) differentiate(*from, to);
    } else {
      stream<4>(vectors, s.count, s.skip, [&](const uint4 &raw, int i) { differentiate(raw, g + s.column + i * N); });
    }
    if (s.single >= 0) store(g[s.single], s.single == target.column ? own : factor * power(single, by));
  }
  if (MODE != kGradient && slices > 1) cluster_wait();
}

} // namespace fastloss
