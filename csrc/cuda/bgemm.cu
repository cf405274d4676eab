// bgemm and bgemm_signs (docs/design.md, "The bit contract"): one tile of bit_tiles.cuh a block, and the epilogue on its
// registers.
#include "bit_tiles.cuh"

#include "row_stats.cuh"

namespace fastloss {
namespace {

struct Epilogue {
  PlaneSums a_sums, b_sums;
  unsigned constant; // K times both offsets
  const float *row_scale, *column_scale, *bias;
  int activation, output;
  void *out;
  int32_t *popcounts;
};

// Blocks go through the tiles in groups of this many rows of tiles, so that those at work share what is in L2.
constexpr int kGroup = 8;

// The sigmoid as torch has it: it is not asked to be equal bit for bit, the others are.
__device__ inline float activate(float y, int activation) {
  if (activation == kRelu) return y < 0 ? 0 : y; // NaN stays
  if (activation == kHardtanh) return y < -1 ? -1 : y > 1 ? 1 : y;
  return activation == kSilu ? y / (1 + expf(-y)) : y;
}

// 8 neighbouring numbers of a row of n, of which `left` are inside.
template <class T, class V> __device__ void put_eight(void *out, int64_t at, int64_t n, int64_t left, const V (&y)[8]) {
  T *const to = static_cast<T *>(out) + at;
  alignas(16) T value[8];
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    if constexpr (std::is_same_v<T, V>) value[c] = y[c];
    else store(value[c], y[c]);
  }
  if (left >= 8 && n * sizeof(T) % 16 == 0) {
#pragma unroll
    for (unsigned v = 0; v < sizeof value / 16; ++v)
      reinterpret_cast<uint4 *>(to)[v] = reinterpret_cast<const uint4 *>(value)[v];
  } else {
#pragma unroll
    for (int c = 0; c < 8; ++c)
      if (c < left) to[c] = value[c];
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    bgemm_kernel(const __grid_constant__ BitOperands p, const __grid_constant__ Epilogue e, const int tiles_m,
                 const int tiles_n) {
  constexpr int BM = Tile::BM, BN = Tile::BN;
  const int first = int(blockIdx.x) / (kGroup * tiles_n) * kGroup, rows = min(kGroup, tiles_m - first);
  const int in_group = int(blockIdx.x) % (kGroup * tiles_n);
  const int64_t m0 = int64_t(first + in_group % rows) * BM, n0 = int64_t(in_group / rows) * BN;
  SHARED_DYNAMIC(uint4, stages);
  SHARED_ARRAY(unsigned, row_sum, [BM]);
  SHARED_ARRAY(unsigned, column_sum, [BN]);
  SHARED_ARRAY(float, row_scale, [BM]);
  SHARED_ARRAY(float, column_scale, [BN]);
  SHARED_ARRAY(float, bias, [BN]);

  // A tile beyond the last column only pads a row of signs.
  BitStream<Tile> stream(p, stages, m0, n0, n0 < p.n ? min(p.n, n0 + BN) : n0);
  for (int r = threadIdx.x; r < BM; r += Tile::kThreads) {
    const bool in = m0 + r < p.m;
    row_sum[r] = in ? e.constant + e.a_sums(m0 + r) : 0;
    row_scale[r] = in && e.row_scale ? __ldg(e.row_scale + m0 + r) : 1;
  }
  for (int c = threadIdx.x; c < BN; c += Tile::kThreads) {
    const bool in = n0 + c < p.n;
    column_sum[c] = in ? e.b_sums(n0 + c) : 0;
    column_scale[c] = in && e.column_scale ? __ldg(e.column_scale + n0 + c) : 1;
    bias[c] = in && e.bias ? __ldg(e.bias + n0 + c) : 0;
  }
  typename Tile::Sums sums;
  if (n0 < p.n) stream.tile(sums);
  __syncthreads(); // the arrays are there, however many steps there were

  const TilePlace<Tile> place;
  const int64_t pitch = e.output == kOutSigns ? (p.n + 511) / 512 * 64 : p.n;
#pragma unroll
  for (int i = 0; i < Tile::MT; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = place.row(i, h);
      const int64_t row = m0 + r;
      int ones = 0;
#pragma unroll
      for (int block = 0; block < Tile::NT / 4; ++block) {
        const int c0 = place.column(block);
        const int64_t column = n0 + c0, left = row < p.m ? p.n - column : 0;
        int acc[8];
#pragma unroll
        for (int c = 0; c < 8; ++c)
          acc[c] = int(unsigned(sums[i][block * 4 + c / 2][h * 2 + c % 2]) * p.pairs.last + row_sum[r] +
                       column_sum[c0 + c]);
        if (e.output == kOutInt32) {
          put_eight<int>(e.out, row * p.n + column, p.n, left, acc);
          continue;
        }
        float y[8];
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          y[c] = __int2float_rn(acc[c]);
          if (e.row_scale) y[c] = __fmul_rn(y[c], row_scale[r]);
          if (e.column_scale) y[c] = __fmul_rn(y[c], column_scale[c0 + c]);
          if (e.bias) y[c] = __fadd_rn(y[c], bias[c0 + c]);
          y[c] = activate(y[c], e.activation);
        }
        if (e.output == kOutSigns) {
          unsigned byte = 0;
#pragma unroll
          for (int c = 0; c < 8; ++c) byte |= unsigned(c < left && y[c] >= 0) << c;
          if (row < p.m && column / 8 < pitch) static_cast<uint8_t *>(e.out)[row * pitch + column / 8] = uint8_t(byte);
          ones += __popc(byte);
        } else if (e.output == kFloat32) put_eight<float>(e.out, row * p.n + column, p.n, left, y);
        else if (e.output == kFloat16) put_eight<__half>(e.out, row * p.n + column, p.n, left, y);
        else put_eight<__nv_bfloat16>(e.out, row * p.n + column, p.n, left, y);
      }
      if (e.output == kOutSigns) {
        ones += __shfl_xor_sync(kAllLanes, ones, 1);
        ones += __shfl_xor_sync(kAllLanes, ones, 2);
        if (threadIdx.x % 4 == 0 && row < p.m && ones) atomicAdd(e.popcounts + row, ones); // whole numbers: in any order
      }
    }
}

template <class Tile> void launch_tiles(const CudaBgemm &p, void *stream) {
  const int64_t columns = p.output == kOutSigns ? row_bytes(p.b.rows) * 8 : p.b.rows;
  const int64_t tiles_m = (p.a.rows + Tile::BM - 1) / Tile::BM, tiles_n = (columns + Tile::BN - 1) / Tile::BN;
  if (tiles_m * kGroup > INT32_MAX / tiles_n)
    throw std::runtime_error("bgemm on CUDA takes at most 2^27 tiles of the product");
  Launch l;
  l.grid = dim3(unsigned(tiles_m * tiles_n));
  l.block = dim3(Tile::kThreads);
  l.smem = Tile::kShared;
  l.stream = static_cast<decltype(l.stream)>(stream);
  const Epilogue e{plane_sums(p.a, p.b.offset),
                   plane_sums(p.b, p.a.offset),
                   unsigned(p.a.columns) * unsigned(p.a.offset) * unsigned(p.b.offset),
                   p.row_scale,
                   p.column_scale,
                   p.bias,
                   p.activation,
                   p.output,
                   p.out,
                   p.popcounts};
  launch(l, bgemm_kernel<Tile>, bit_operands(p.a, p.b), e, int(tiles_m), int(tiles_n));
}

} // namespace

BgemmPlan bgemm_plan(int64_t m, int64_t n, const DeviceLimits &device) {
  const bool fills = m > 64 && n > 64 && (m + 127) / 128 >= (device.multiprocessors + (n + 127) / 128 - 1) / ((n + 127) / 128);
  return {device.capability >= 100, fills};
}

void bgemm_launch(const CudaBgemm &p, BgemmPlan plan, void *stream) {
  if (p.a.rows == 0 || p.b.rows == 0) return;
  if (plan.int8 && plan.large) launch_tiles<BitTile<true, 128, 128, 64, 64, 4>>(p, stream);
  else if (plan.int8) launch_tiles<BitTile<true, 64, 64, 32, 32, 4>>(p, stream);
  else if (plan.large) launch_tiles<BitTile<false, 128, 128, 64, 64, 4>>(p, stream);
  else launch_tiles<BitTile<false, 64, 64, 32, 32, 4>>(p, stream);
}

void bgemm_cuda(const CudaBgemm &p, int device, void *stream) {
  const DeviceGuard guard(device);
  bgemm_launch(p, bgemm_plan(p.a.rows, p.b.rows, device_limits(device)), stream);
}

} // namespace fastloss
