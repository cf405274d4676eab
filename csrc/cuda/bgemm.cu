// bgemm and bgemm_signs (docs/design.md, "The bit contract"): one tile of bit_tiles.cuh a block, then the epilogue on
// its rows.
//
// What an H200 should take, from the SASS for sm_90 and from bytes (132 multiprocessors, 1.98 GHz, 17.7k bit products a
// clock each, which is 9.25 POPS; L2 about 5.5 TB/s, so 21 bytes a clock each). A step of 512 bits of a 256 x 128 tile
// is 8 warps x 64 BMMA: 948 clocks of the tensor cores. A warp issues 191 instructions, two warps share a scheduler:
// 382 clocks. ldmatrix reads 64 KiB and cp.async writes 24 KiB of shared memory at 128 bytes a clock: 704 clocks. L2
// gives 24 KiB in 1170 clocks: that is the bound, at 0.81 of the peak; of 128 x 128 tiles it were 0.61.
// The epilogue is about 3k clocks a tile, and of a 256 x 128 tile nothing else runs beside it.
//   8192^3, int32          2048 tiles, 16 waves x (16 steps x 1170 + 3k) = 350k clocks     0.18 ms, 6.3 POPS
//   4096^3, int32          512 tiles, 4 waves x (8 steps x 1170 + 3k) = 50k clocks         0.025 ms, 5.5 POPS
//   8192^2 x 1024, int32   writes 268 MB at 4.8 TB/s; 16 waves x 5.3k are 0.043 ms         0.056 ms
//   1 x 8192 by 8192       128 blocks of 64 x 64 read 8.4 MB                               0.004 ms
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

// 4 neighbouring numbers of a row of n, of which `left` are inside.
template <class T, class V> __device__ void put_four(void *out, int64_t at, int64_t n, int64_t left, const V (&y)[4]) {
  T *const to = static_cast<T *>(out) + at;
  T value[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    if constexpr (std::is_same_v<T, V>) value[c] = y[c];
    else store(value[c], y[c]);
  }
  if (left >= 4 && n % 4 == 0) {
    std::conditional_t<sizeof(T) == 4, uint4, uint2> four;
    memcpy(&four, value, sizeof four);
    *reinterpret_cast<decltype(four) *>(to) = four;
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (c < left) to[c] = value[c];
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    bgemm_kernel(const __grid_constant__ BitOperands p, const __grid_constant__ Epilogue e, const int tiles_m,
                 const int tiles_n) {
  constexpr int BM = Tile::BM, BN = Tile::BN;
  constexpr int kLanes = BN / 4, kRowsAtOnce = Tile::kThreads / kLanes; // 4 columns a thread
  static_assert(TileSums<Tile>::kBytes <= Tile::kShared, "the sums take the place of the stages");
  const int first = int(blockIdx.x) / (kGroup * tiles_n) * kGroup, group = min(kGroup, tiles_m - first);
  const int in_group = int(blockIdx.x) % (kGroup * tiles_n);
  const int64_t m0 = int64_t(first + in_group % group) * BM, n0 = int64_t(in_group / group) * BN;
  SHARED_DYNAMIC(uint4, stages);
  SHARED_ARRAY(unsigned, row_sum, [BM]);
  SHARED_ARRAY(float, row_scale, [BM]);

  // A tile beyond the last column only pads a row of signs.
  BitStream<Tile> stream(p, stages, m0, n0, n0 < p.n ? min(p.n, n0 + BN) : n0);
  for (int r = threadIdx.x; r < BM; r += Tile::kThreads) {
    const bool in = m0 + r < p.m;
    row_sum[r] = in ? e.constant + e.a_sums(m0 + r) : 0;
    row_scale[r] = in && e.row_scale ? __ldg(e.row_scale + m0 + r) : 1;
  }
  const int lane = threadIdx.x % kLanes;
  const int64_t column = n0 + lane * 4, inside = p.n - column;
  unsigned column_sum[4];
  float column_scale[4], bias[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    column_sum[c] = c < inside ? e.b_sums(column + c) : 0;
    column_scale[c] = c < inside && e.column_scale ? __ldg(e.column_scale + column + c) : 1;
    bias[c] = c < inside && e.bias ? __ldg(e.bias + column + c) : 0;
  }

  const TileSums<Tile> tile{reinterpret_cast<int *>(stages)};
  if (n0 < p.n) {
    typename Tile::Sums sums;
    stream.tile(sums);
    __syncthreads(); // all have done with the stages
    tile.put(sums, p.pairs.last);
  }
  __syncthreads();

  const int64_t pitch = (p.n + 511) / 512 * 64; // of a row of signs
#pragma unroll 2
  for (int r = threadIdx.x / kLanes; r < BM; r += kRowsAtOnce) {
    const int64_t row = m0 + r, at = row * p.n + column, left = row < p.m ? inside : 0;
    const int4 sums = *reinterpret_cast<const int4 *>(tile.at(r, lane * 4));
    int acc[4] = {sums.x, sums.y, sums.z, sums.w};
    float y[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      acc[c] = int(unsigned(acc[c]) + row_sum[r] + column_sum[c]);
      y[c] = __int2float_rn(acc[c]);
      if (e.row_scale) y[c] = __fmul_rn(y[c], row_scale[r]);
      if (e.column_scale) y[c] = __fmul_rn(y[c], column_scale[c]);
      if (e.bias) y[c] = __fadd_rn(y[c], bias[c]);
      y[c] = activate(y[c], e.activation);
    }
    if (e.output == kOutInt32) put_four<int>(e.out, at, p.n, left, acc);
    else if (e.output == kFloat32) put_four<float>(e.out, at, p.n, left, y);
    else if (e.output == kFloat16) put_four<__half>(e.out, at, p.n, left, y);
    else if (e.output == kBFloat16) put_four<__nv_bfloat16>(e.out, at, p.n, left, y);
    else { // 8 threads have a word of signs
      unsigned signs = 0;
#pragma unroll
      for (int c = 0; c < 4; ++c) signs |= unsigned(c < left && y[c] >= 0) << (lane % 8 * 4 + c);
#pragma unroll
      for (int distance = 1; distance < 8; distance *= 2) signs |= __shfl_xor_sync(kAllLanes, signs, distance);
      if (lane % 8 == 0 && row < p.m && column / 8 < pitch) {
        reinterpret_cast<unsigned *>(e.out)[(row * pitch + column / 8) / 4] = signs;
        if (signs) atomicAdd(e.popcounts + row, __popc(signs)); // whole numbers: in any order
      }
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

template <bool INT8> static void launch_plan(const CudaBgemm &p, int tile, void *stream) {
  if (tile == 2) launch_tiles<BitTile<INT8, 256, 128, 64, 64, 6>>(p, stream);
  else if (tile == 1) launch_tiles<BitTile<INT8, 128, 128, 64, 64, 4>>(p, stream);
  else launch_tiles<BitTile<INT8, 64, 64, 32, 32, 4>>(p, stream);
}

// The largest tiles that there are enough of, one for each multiprocessor, and that shared memory has room for.
BgemmPlan bgemm_plan(int64_t m, int64_t n, const DeviceLimits &device) {
  const auto tiles = [&](int64_t bm, int64_t bn) { return ((m + bm - 1) / bm) * ((n + bn - 1) / bn); };
  const bool int8 = device.capability >= 100;
  if (m > 128 && n > 64 && tiles(256, 128) >= device.multiprocessors && device.shared_per_block >= (160 << 10))
    return {int8, 2};
  return {int8, m > 64 && n > 64 && tiles(128, 128) >= device.multiprocessors};
}

void bgemm_launch(const CudaBgemm &p, BgemmPlan plan, void *stream) {
  if (p.a.rows == 0 || p.b.rows == 0) return;
  if (plan.int8) launch_plan<true>(p, plan.tile, stream);
  else launch_plan<false>(p, plan.tile, stream);
}

void bgemm_cuda(const CudaBgemm &p, int plan, int device, void *stream) {
  const DeviceGuard guard(device);
  const BgemmPlan automatic = bgemm_plan(p.a.rows, p.b.rows, device_limits(device));
  bgemm_launch(p, plan == kAutomatic ? automatic : BgemmPlan{(plan & 4) != 0, plan & 3}, stream);
}

} // namespace fastloss
