// lossless_linear (docs/design.md, "The lossless contract"): y = x Wᵀ + bias from the P7 blob of a bf16 matrix, which
// is decoded into the registers of the tensor cores and nowhere else.
//
// A warp has a band of 16 rows, a block eight bands and a part of the columns. The blocks that share rows are a
// cluster: each leaves its sums in shared memory, and they are added in the order of the parts, so that the result is
// the same every time. Below sm_90 the sums go through memory, to a second kernel.
//
// Escaped pairs are +0 in the matrix of codes. They are eight more columns each time eight of them are read: pair p of
// the list is columns 2 p and 2 p + 1 of a matrix that is zero but in the row of the pair, and the same tensor core
// instruction adds it. So an infinite activation gives NaN wherever a weight of its column in the band of 16 rows
// escaped, where the exact product were infinite.
//
// What an H200 should take (132 multiprocessors, 1.755 GHz, 4.3 TB/s), from bytes, the SASS for sm_90 and wavefronts of
// shared memory. 1.4375 bytes a weight; the loop has 244 instructions for a warp's unit of 2048 weights (3.8 for a
// lane's weight; layout rows 269, 4.2) up to eight rows of x, where 29.6e12 lanes' instructions a second are 13e12
// weights' worth of 3e12, and 94 wavefronts (rows 102), which are 5e12. So memory is the bound; two blocks a
// multiprocessor have 100 KB in flight, and 30 would do. Of 64 rows of x the tiles take 379 instructions and 206
// wavefronts: those are the bound there.
//   8192 x 8192, 1 to 8 rows    96 MB, 22.4 us and 2 us to begin and end    24.5 us; bf16 33 us: 1.35 times as fast
//   4096 x 4096, 1 to 8 rows    24 MB                                       7.6 us; bf16 9.8 us
//   8192 x 8192, 64 rows        6.7e6 wavefronts                            31 us; bf16 34 us
#include "lossless_linear.cuh"

#include <algorithm>

namespace fastloss {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kBlockRows = kWarps * kUnitRows;
constexpr int kPitch = kBlockRows + 4; // of a column of sums: eight rows by four columns lie in different banks
constexpr int64_t kBlockPairs = kLosslessBlock / 2;

// TILES of eight rows of x. Two blocks fit a multiprocessor, and one the 99 KiB of a small one.
template <int TILES> struct Stages {
  static constexpr int kCount = TILES <= 2 ? 3 : 2;
  static constexpr int kBytes = TILES * kInputTile + kWarps * kUnit;
  static constexpr int kShared = kTableBytes + kCount * kBytes;
  static_assert(TILES * 8 * kPitch * 4 <= kCount * kBytes, "the sums take the place of the stages");
};

struct EscapedPair {
  unsigned value = 0; // two bf16; 0 where there is no pair
  int row = -1, column = 0;
};

// Pair `at` of block `block`, if it lies in numbers begin..end of the sequence: nothing in the list is trusted.
template <int LAYOUT>
__device__ EscapedPair escaped_pair(const LinearOperands &p, int64_t block, uint64_t at, int64_t begin, int64_t end) {
  EscapedPair pair;
  const int64_t position = __ldg(p.escape_positions + at), number = block * kLosslessBlock + 2 * position;
  if (position < kBlockPairs && number >= begin && number < end) {
    const Place place = place_of<LAYOUT>(unsigned(number - begin), p.units);
    pair = {__ldg(p.escape_values + at), place.row, place.column};
  }
  return pair;
}

// Part `part` of `parts` of the escapes of a band.
template <int LAYOUT, int TILES>
__device__ void add_escapes(float (&sum)[TILES][4], const LinearOperands &p, int64_t band, int part, int parts,
                            int lane) {
  const int64_t columns = p.columns(), begin = band * kUnitRows * columns;
  const int64_t end = min(begin + kUnitRows * columns, p.numel), last = (end - 1) / kLosslessBlock;
  const int g = lane >> 2, t = lane & 3;
  for (int64_t block = begin / kLosslessBlock + part; block <= last; block += parts) {
    const uint64_t from = min(__ldg(p.escape_offsets + block), uint64_t(p.escapes));
    const uint64_t to = min(min(__ldg(p.escape_offsets + block + 1), uint64_t(p.escapes)), from + kBlockPairs);
    for (uint64_t at = from; at < to; at += 8) { // columns 2t, 2t+1 of the fragment, then 2t+8, 2t+9
      EscapedPair pair[2];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (at + 4 * half + t < to) pair[half] = escaped_pair<LAYOUT>(p, block, at + 4 * half + t, begin, end);
      const unsigned a[4] = {pair[0].row == g ? pair[0].value : 0, pair[0].row == g + 8 ? pair[0].value : 0,
                             pair[1].row == g ? pair[1].value : 0, pair[1].row == g + 8 ? pair[1].value : 0};
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        const int input = 8 * tile + g;
        unsigned b[2] = {0, 0};
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (input < p.n && pair[half].row >= 0)
            b[half] = __ldg(reinterpret_cast<const unsigned *>(p.x + input * columns + pair[half].column));
        mma_m16n8k16_bf16(sum[tile], a, b);
      }
    }
  }
}

__device__ inline __nv_bfloat16 rounded(float y, const __nv_bfloat16 *bias, int64_t row) {
  return __float2bfloat16_rn(bias ? y + __bfloat162float(bias[row]) : y);
}

template <int LAYOUT, int TILES>
__global__ void __launch_bounds__(kThreads, 2) lossless_linear_kernel(const __grid_constant__ LinearOperands p) {
  using S = Stages<TILES>;
  SHARED_DYNAMIC(char, shared);
  char *const stages = shared + kTableBytes;
  const SharedAddress stages_address = shared_address(stages);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int part = int(blockIdx.x) % p.splits;
  const int64_t block = blockIdx.x / p.splits, row0 = block * kBlockRows;
  // Warps beyond the last band repeat it: where no warp leaves the others, addresses are in uniform registers.
  const int64_t bands = (p.rows + kUnitRows - 1) / kUnitRows, band = min(block * kWarps + warp, bands - 1);
  const int first = int(int64_t(p.units) * part / p.splits);
  const int count = int(int64_t(p.units) * (part + 1) / p.splits) - first;
  fill_table(p.table, shared, threadIdx.x, kThreads);

  Units<LAYOUT> units(p, band, first, lane);
  const int x_row = threadIdx.x / 16, x_chunk = threadIdx.x % 16;
  const int x_to = Units<LAYOUT>::input_chunk(x_row, x_chunk) * 16;
  const __nv_bfloat16 *x_from = p.x + x_row * p.columns() + int64_t(first) * kUnitColumns + x_chunk * 8;
  SharedAddress to = stages_address;
  int left = count; // to be staged
  const auto stage = [&] {
    if (left > 0) {
#pragma unroll
      for (int i = 0; i < (TILES + 1) / 2; ++i)
        if (TILES > 1 || x_row < 8) // rows beyond n are zero
          cp_async16(to + x_to + 4096 * i, x_from + 16 * i * p.columns(), x_row + 16 * i < p.n ? 16 : 0);
      units.stage(to + TILES * kInputTile + warp * kUnit);
      x_from += kUnitColumns;
      to = to == stages_address + (S::kCount - 1) * S::kBytes ? stages_address : to + S::kBytes;
      --left;
    }
    cp_async_commit();
  };

  float sum[TILES][4] = {};
#pragma unroll
  for (int i = 0; i < S::kCount - 1; ++i) stage();
  char *at = stages;
  for (int unit = 0; unit < count; ++unit) {
    cp_async_wait<S::kCount - 2>();
    __syncthreads(); // the unit is there, and all have done with the one before
    stage();
    units.load(at + TILES * kInputTile + warp * kUnit);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      unsigned a[2][4];
      units.fragment(a[0], 2 * s, shared);
      units.fragment(a[1], 2 * s + 1, shared);
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        unsigned b[4];
        units.inputs(b, at + tile * kInputTile, s);
        mma_m16n8k16_bf16(sum[tile], a[0], {b[0], b[1]});
        mma_m16n8k16_bf16(sum[tile], a[1], {b[2], b[3]});
      }
    }
    at = at == stages + (S::kCount - 1) * S::kBytes ? stages : at + S::kBytes;
  }
  if (p.escapes) add_escapes<LAYOUT, TILES>(sum, p, band, part, p.splits, lane);

  cp_async_wait<0>();
  __syncthreads(); // all have done with the stages
  float *const sums = reinterpret_cast<float *>(stages);
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      sums[(8 * tile + 2 * (lane & 3) + (i & 1)) * kPitch + warp * kUnitRows + (lane >> 2) + 8 * (i >> 1)] =
          sum[tile][i];
  const int shares = p.parts ? 1 : p.splits; // of what is to be written
  if (shares > 1) cluster_sync();
  else __syncthreads();
  for (int k = (shares > 1 ? part : 0) * kThreads + threadIdx.x; k < p.n * kBlockRows; k += shares * kThreads) {
    const int input = k / kBlockRows, at = input * kPitch + k % kBlockRows;
    const int64_t row = row0 + k % kBlockRows;
    if (row >= p.rows) continue;
    if (p.parts) {
      p.parts[(part * int64_t(p.n) + input) * p.rows + row] = sums[at];
      continue;
    }
    float y = shares > 1 ? cluster_map(sums, 0)[at] : sums[at];
    for (int other = 1; other < shares; ++other) y += cluster_map(sums, other)[at];
    p.out[input * p.rows + row] = rounded(y, p.bias, row);
  }
  if (shares > 1) cluster_sync(); // nobody leaves while its sums are read
}

__global__ void __launch_bounds__(kThreads) add_parts_kernel(const __grid_constant__ LinearOperands p) {
  const int64_t size = p.n * p.rows, at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= size) return;
  float y = p.parts[at];
  for (int part = 1; part < p.splits; ++part) y += p.parts[part * size + at];
  p.out[at] = rounded(y, p.bias, at % p.rows);
}

template <int LAYOUT, int TILES>
void launch_tiles(const LinearOperands &p, LosslessLinearPlan plan, decltype(Launch::stream) stream) {
  Launch l;
  l.grid = dim3(unsigned((p.rows + kBlockRows - 1) / kBlockRows * p.splits));
  l.block = dim3(kThreads);
  l.smem = Stages<TILES>::kShared;
  l.cluster = plan.cluster ? plan.splits : 1;
  l.stream = stream;
  launch(l, lossless_linear_kernel<LAYOUT, TILES>, p);
  if (!p.parts) return;
  Launch add;
  add.grid = dim3(unsigned((p.n * p.rows + kThreads - 1) / kThreads));
  add.block = dim3(kThreads);
  add.stream = stream;
  launch(add, add_parts_kernel, p);
}

template <int LAYOUT>
void launch_layout(const LinearOperands &p, LosslessLinearPlan plan, decltype(Launch::stream) stream) {
  if (p.n <= 8) launch_tiles<LAYOUT, 1>(p, plan, stream);
  else if (p.n <= 16) launch_tiles<LAYOUT, 2>(p, plan, stream);
  else if (p.n <= 32) launch_tiles<LAYOUT, 4>(p, plan, stream);
  else launch_tiles<LAYOUT, 8>(p, plan, stream);
}

} // namespace

// The parts that end soonest if a block costs its units and three more to begin and end.
LosslessLinearPlan lossless_linear_plan(int64_t rows, int64_t columns, const DeviceLimits &device) {
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows, units = columns / kUnitColumns;
  const int64_t slots = 2 * device.multiprocessors;
  int best = 1;
  int64_t least = INT64_MAX;
  for (int splits = 1; splits <= 8 && splits <= units; splits *= 2) {
    const int64_t cost = (blocks * splits + slots - 1) / slots * ((units + splits - 1) / splits + 3);
    if (cost < least) least = cost, best = splits;
  }
  return {best, best > 1 && best <= device.max_cluster};
}

void lossless_linear_launch(const CudaLosslessLinear &c, LosslessLinearPlan plan, void *stream) {
  if (c.n == 0 || c.w.rows == 0) return;
  const LinearOperands p{c.w.table,
                         c.w.codes,
                         c.w.bytes[0],
                         c.w.escape_offsets,
                         c.w.escape_positions,
                         static_cast<const unsigned *>(c.w.escape_values),
                         c.w.escapes,
                         c.w.numel,
                         c.w.rows,
                         static_cast<const __nv_bfloat16 *>(c.x),
                         static_cast<const __nv_bfloat16 *>(c.bias),
                         static_cast<__nv_bfloat16 *>(c.out),
                         plan.splits > 1 && !plan.cluster ? c.parts : nullptr,
                         int(c.n),
                         int(c.w.columns / kUnitColumns),
                         plan.splits};
  const auto to = static_cast<decltype(Launch::stream)>(stream);
  if (c.w.layout == kLayoutTiles) launch_layout<kLayoutTiles>(p, plan, to);
  else launch_layout<kLayoutRows>(p, plan, to);
}

void lossless_linear_cuda(const CudaLosslessLinear &p, int device, void *stream) {
  const DeviceGuard guard(device);
  lossless_linear_launch(p, lossless_linear_plan(p.w.rows, p.w.columns, device_limits(device)), stream);
}

} // namespace fastloss
