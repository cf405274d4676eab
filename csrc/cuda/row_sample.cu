// A token of each row's softmax by the Gumbel-max trick, and its log-probability, in one pass over the logits. The
// noise is a function of seed, stream and column, the same on every backend: docs/design.md, "Sampling".
#include "cuda.h"
#include "row_stats.cuh"

#include <algorithm>
#include <cfloat>

namespace fastloss {
namespace {

constexpr unsigned kCoarse = 1u << 16; // below it 32 bits are too few, and 32 more are drawn

struct Words {
  unsigned word[4];
};

// Where a row's random bits come from.
struct Noise {
  unsigned key[2], stream[2];

  // Philox 4x32-10: four words for the columns 4 * block ... 4 * block + 3.
  __device__ Words words(unsigned block, unsigned half) const {
    unsigned c0 = block, c1 = half, c2 = stream[0], c3 = stream[1], k0 = key[0], k1 = key[1];
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const unsigned first = __umulhi(0xD2511F53u, c0), second = __umulhi(0xCD9E8D57u, c2);
      const unsigned low = 0xCD9E8D57u * c2, last = 0xD2511F53u * c0;
      c0 = second ^ c1 ^ k0, c1 = low;
      c2 = first ^ c3 ^ k1, c3 = last;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
  }
};

__device__ inline unsigned pick(const Words &w, int i) {
  return i < 2 ? (i == 0 ? w.word[0] : w.word[1]) : (i == 2 ? w.word[2] : w.word[3]);
}

// The words of N columns that may begin anywhere in a block of four.
template <int N> __device__ void words_of(const Noise &noise, int column, unsigned (&bits)[N]) {
  constexpr int kBlocks = (N + 6) / 4;
  unsigned all[4 * kBlocks] = {};
  const int phase = column % 4;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    if (4 * b >= N && phase == 0) break; // the same for all vectors of a row
    const Words w = noise.words(unsigned(column / 4 + b), 0);
#pragma unroll
    for (int k = 0; k < 4; ++k) all[4 * b + k] = w.word[k];
  }
#pragma unroll
  for (int k = 0; k < N; ++k) { // selects: an index that is known only at run time would go through local memory
    const unsigned even = phase & 1 ? all[k + 1] : all[k];
    const unsigned odd = k + 3 < 4 * kBlocks ? (phase & 1 ? all[k + 3] : all[k + 2]) : 0;
    bits[k] = phase & 2 ? odd : even;
  }
}

// E of a column, exponential with rate 1, from its first 32 bits.
__device__ inline float exponential_of(const Noise &noise, int column, unsigned bits) {
  if (bits >= 0x80000000u) return -logf((float(~bits) + 0.5f) * 0x1p-32f); // of 1 - uniform, which has all its digits
  float uniform = (float(bits) + 0.5f) * 0x1p-32f;
  if (bits < kCoarse) {
    const unsigned more = pick(noise.words(unsigned(column / 4), 1), column % 4);
    uniform = fmaf(float(more) + 0.5f, 0x1p-32f, float(bits)) * 0x1p-32f;
  }
  return -log1pf(-uniform);
}

// What is known after some columns: max, sum of e^(z - max), and of the best column its score and noise -log E.
struct Drawn {
  float max, sum, score, gumbel;
  int column;
};

__device__ inline float power(float z, float max) { return exp2_approx((z - max) * kLog2e); }
__device__ inline float rescale(float from, float to) { return from == to ? 1 : power(from, to); }

// Two scores are compared by their difference, which is exact where they are near each other, whatever their offset.
__device__ inline float lead(const Drawn &a, const Drawn &b) {
  return a.column < 0 ? -kInf : b.column < 0 ? kInf : (a.score - b.score) + (a.gumbel - b.gumbel);
}

__device__ inline Drawn merge(const Drawn &a, const Drawn &b) {
  const float by = lead(a, b), max = fmaxf(a.max, b.max);
  const bool first = by > 0 || (by == 0 && a.column < b.column);
  return {max, fmaf(a.sum, rescale(a.max, max), b.sum * rescale(b.max, max)), first ? a.score : b.score,
          first ? a.gumbel : b.gumbel, first ? a.column : b.column};
}

// 2^32 e^(max - best key) and a little more: what a column's power, times this, its 32 bits must be below to win still.
__device__ inline float reach(const Drawn &d) {
  return d.column < 0 ? kInf : 1.001f * exp2_approx(32 + ((d.max - d.score) - d.gumbel) * kLog2e);
}

// Takes in N columns. E is not below its uniform number, so that only a column whose uniform lies below e^(z - best
// key) can still win: for all others one comparison is enough.
template <int N> __device__ void fold(const Noise &noise, const float (&z)[N], int column, Drawn &drawn) {
  float max = drawn.max, powers[N], sum = 0;
#pragma unroll
  for (int k = 0; k < N; ++k) max = fmaxf(max, z[k]);
  const float ref = max == -kInf ? 0 : max;
#pragma unroll
  for (int k = 0; k < N; ++k) sum += powers[k] = power(z[k], ref);
  drawn.sum = fmaf(drawn.sum, rescale(drawn.max, max), sum);
  drawn.max = max;
  unsigned bits[N];
  words_of(noise, column, bits);
  float limit = reach(drawn);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (!(float(bits[k]) < powers[k] * limit)) continue;
    const Drawn here{0, 0, z[k], -logf(exponential_of(noise, column + k, bits[k])), column + k};
    if (!(lead(here, drawn) > 0)) continue;
    drawn.score = here.score, drawn.gumbel = here.gumbel, drawn.column = here.column;
    limit = reach(drawn);
  }
}

// z of a logit. -inf stays: neither a cap nor a negative scale brings the column back.
__device__ inline float score_of(const RowSample &p, float logit) {
  if (logit < -FLT_MAX) return -kInf;
  return p.softcap == 0 ? __fmul_rn(logit, p.scale) : p.softcap * tanhf(logit * (p.scale / p.softcap));
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    row_sample_kernel(const RowSample p, const int64_t first_row, const int slices) {
  SHARED_ARRAY(Drawn, part, [kMaxWarps]);
  constexpr int N = kWidth<T>;
  const int rank = blockIdx.x % slices;
  const int64_t row = first_row + blockIdx.x / slices;
  const uint64_t seed = uint64_t(*p.seed), stream_of_row = uint64_t(p.streams[row]);
  const Noise noise{{unsigned(seed), unsigned(seed >> 32)}, {unsigned(stream_of_row), unsigned(stream_of_row >> 32)}};
  const T *logits = static_cast<const T *>(p.logits) + row * p.ld;
  const Slice s = slice_of(logits, int(p.v), -1, slices, rank);
  const bool plain = p.scale == 1 && p.softcap == 0;

  const Drawn none{-kInf, 0, -kInf, 0, -1};
  Drawn drawn = none;
  stream<2>(reinterpret_cast<const uint4 *>(logits + s.column), s.count, -1, [&](const uint4 &raw, int i) {
    float z[N];
    unpack<T>(raw, z);
    if (!plain)
#pragma unroll
      for (int k = 0; k < N; ++k) z[k] = score_of(p, z[k]);
    fold(noise, z, s.column + i * N, drawn);
  });
  if (s.single >= 0) {
    const float z[1] = {score_of(p, to_float(logits[s.single]))};
    fold(noise, z, s.single, drawn);
  }
  drawn = merge_blocks(drawn, none, part, slices);
  if (slices > 1) cluster_arrive_relaxed(); // no block leaves while another still reads its part
  if (rank == 0 && threadIdx.x == 0) {
    const float logsum = logf(drawn.sum);
    const bool distribution = drawn.column >= 0 && logsum < kInf; // not NaN
    p.index[row] = distribution ? drawn.column : -1;
    p.logp[row] = distribution ? (drawn.score - drawn.max) - logsum : NAN;
  }
  if (slices > 1) cluster_wait();
}

template <class T>
void launch_rows(const RowSample &p, const RowSamplePlan &plan, int64_t first, int64_t rows, void *stream) {
  Launch l;
  l.grid = dim3(unsigned(rows * plan.slices));
  l.block = dim3(unsigned(plan.threads));
  l.cluster = unsigned(plan.slices);
  l.stream = static_cast<decltype(l.stream)>(stream);
  launch(l, row_sample_kernel<T>, p, first, plan.slices);
}

} // namespace

RowSamplePlan row_sample_plan(const RowSample &p, const DeviceLimits &device) {
  const int64_t bytes = p.v * (p.dtype == kFloat32 ? 4 : 2);
  RowSamplePlan plan{};
  plan.slices = 1; // of a row that few others share the device with, as many blocks as a cluster has
  while (plan.slices < device.max_cluster && p.n * plan.slices < 4 * device.multiprocessors &&
         bytes / plan.slices >= 8192)
    plan.slices *= 2;
  const int64_t slice = bytes / plan.slices;
  plan.threads = slice >= 16384 ? 256 : slice >= 4096 ? 128 : 64;
  plan.rows_per_launch = INT32_MAX / plan.slices;
  return plan;
}

void row_sample_launch(const RowSample &p, const RowSamplePlan &plan, void *stream) {
  const auto launch_some = p.dtype == kFloat32   ? launch_rows<float>
                           : p.dtype == kFloat16 ? launch_rows<__half>
                                                 : launch_rows<__nv_bfloat16>;
  for (int64_t first = 0; first < p.n; first += plan.rows_per_launch)
    launch_some(p, plan, first, std::min(p.n - first, plan.rows_per_launch), stream);
}

void row_sample_cuda(const RowSample &p, int device, void *stream) {
  if (p.v >= int64_t(1) << 31) throw std::runtime_error("row_sample counts columns with 32 bits: V must be below 2^31");
  if (p.n == 0) return;
  const DeviceGuard guard(device);
  row_sample_launch(p, row_sample_plan(p, device_limits(device)), stream);
}

} // namespace fastloss
