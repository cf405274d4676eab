// hamming_topk (docs/design.md, "The bit contract"): no [M, N] matrix. A block has 128 rows of a and goes along a part of
// b in tiles of bit_tiles.cuh; a warp keeps the best of its 32 rows. A candidate is one integer that orders as the result
// does, its score in the upper half and its column, falling, in the lower: no two are equal, so the order in which they
// come does not matter, and equal scores go to the lowest column. The lists lie in `keys`, that is in L1; only scores above
// the last of a row's list are looked at again, which soon are few: about count log(N / count) of N.
#include "bit_tiles.cuh"

#include "row_stats.cuh"

namespace fastloss {
namespace {

constexpr int64_t kAbsent = INT64_MIN; // below every key
constexpr int kMergeWarps = 8;

struct Search {
  PlaneSums a_sums, b_sums;
  unsigned constant;
  const float *scale;
  int64_t *keys;
  int splits, count;
};

// A score as an integer of the same order. As in torch's sort NaN comes first, and 0 and -0 are equal.
__device__ inline int ordered(float x) {
  if (x != x) return INT32_MAX;
  const int bits = x == 0 ? 0 : __float_as_int(x);
  return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ inline float ordered_back(int order) {
  return order == INT32_MAX ? NAN : __int_as_float(order ^ (order >> 31 & 0x7fffffff));
}

__device__ inline int64_t key_of(int order, int64_t column) {
  return int64_t(uint64_t(unsigned(order)) << 32 | unsigned(~unsigned(column)));
}

// Puts a key into a falling list, by all lanes of a warp; the last one leaves it.
__device__ inline void insert(int64_t *list, int count, int64_t key) {
  const int lane = threadIdx.x % 32;
  for (int first = (count - 1) / 32 * 32; first >= 0; first -= 32) {
    const int slot = first + lane;
    int64_t here = kAbsent, before = INT64_MAX;
    if (slot < count) here = list[slot];
    if (slot > 0 && slot < count) before = list[slot - 1];
    __syncwarp(); // before is another lane's slot
    if (slot < count && here < key) list[slot] = before < key ? before : key;
    __syncwarp();
    if (__shfl_sync(kAllLanes, before, 0) > key) break; // what stands further up is larger
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    topk_kernel(const __grid_constant__ BitOperands p, const __grid_constant__ Search s) {
  constexpr int MT = Tile::MT, NT = Tile::NT;
  const int split = int(blockIdx.x) % s.splits;
  const int64_t m0 = int64_t(blockIdx.x) / s.splits * Tile::BM;
  const int64_t tiles = (p.n + Tile::BN - 1) / Tile::BN, each = (tiles + s.splits - 1) / s.splits;
  const int64_t begin = min(p.n, split * each * Tile::BN), end = min(p.n, (split + 1) * each * Tile::BN);
  SHARED_DYNAMIC(uint4, stages);
  BitStream<Tile> stream(p, stages, m0, begin, end);

  const int lane = threadIdx.x % 32;
  const TilePlace<Tile> place;
  // Only this warp ever touches the lists of its rows: of row r, count keys from (r splits + split) count on.
  const int64_t warp_row = m0 + threadIdx.x / 32 * Tile::WM;
  for (int r = 0; r < Tile::WM && warp_row + r < p.m; ++r)
    for (int slot = lane; slot < s.count; slot += 32)
      s.keys[((warp_row + r) * s.splits + split) * s.count + slot] = kAbsent;
  unsigned row_sum[MT][2];
  int worst[MT][2]; // the score of the last in the list: what follows has to be better
#pragma unroll
  for (int i = 0; i < MT; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = m0 + place.row(i, h);
      row_sum[i][h] = row < p.m ? s.constant + s.a_sums(row) : 0;
      worst[i][h] = row < p.m ? INT32_MIN : INT32_MAX; // below and above all scores
    }
  __syncwarp();

  for (int64_t n0 = begin; n0 < end; n0 += Tile::BN) {
    typename Tile::Sums sums;
    stream.tile(sums);
#pragma unroll
    for (int block = 0; block < NT / 4; ++block) {
      const int64_t column = n0 + place.column(block);
      unsigned column_sum[8];
      float scale[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const bool in = column + c < end;
        column_sum[c] = in ? s.b_sums(column + c) : 0;
        scale[c] = in && s.scale ? __ldg(s.scale + column + c) : 1;
      }
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          unsigned enter = 0; // the columns, of these 8, that enter the list as it is now
          int order[8];
#pragma unroll
          for (int c = 0; c < 8; ++c) {
            order[c] = int(unsigned(sums[i][block * 4 + c / 2][h * 2 + c % 2]) * p.pairs.last + row_sum[i][h] +
                           column_sum[c]);
            if (s.scale) order[c] = ordered(__fmul_rn(__int2float_rn(order[c]), scale[c]));
            enter |= unsigned(column + c < end && order[c] > worst[i][h]) << c;
          }
          unsigned waiting = __ballot_sync(kAllLanes, enter != 0);
          if (waiting == 0) continue;
          for (; waiting; waiting &= waiting - 1) { // one lane's columns after the other
            const int owner = __ffs(int(waiting)) - 1;
            const int64_t row = warp_row + i * 16 + h * 8 + owner / 4;
            int64_t *const list = s.keys + (row * s.splits + split) * s.count;
            const unsigned columns = __shfl_sync(kAllLanes, enter, owner);
            const int64_t column0 = n0 + block * 32 + owner % 4 * 8;
#pragma unroll
            for (int c = 0; c < 8; ++c)
              if (columns >> c & 1) insert(list, s.count, key_of(__shfl_sync(kAllLanes, order[c], owner), column0 + c));
          }
          const int64_t row = m0 + place.row(i, h);
          if (row < p.m) worst[i][h] = int(s.keys[((row * s.splits + split) + 1) * s.count - 1] >> 32);
        }
    }
  }
}

// The lists of the parts of b become one: a block has a row; a warp merges every kMergeWarps-th list into its first one.
__global__ void __launch_bounds__(kMergeWarps * 32)
    merge_kernel(int64_t *const keys, const int splits, const int count, const bool scaled, void *const values,
                 int64_t *const index) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = blockIdx.x;
  int64_t *const lists = keys + row * splits * count;
  const auto merge = [&](int64_t *into, const int64_t *from) {
    for (int first = 0; first < count; first += 32) {
      const int64_t key = first + lane < count ? from[first + lane] : kAbsent, last = into[count - 1];
      unsigned enter = __ballot_sync(kAllLanes, key > last);
      if (enter == 0) break; // what follows is smaller
      for (; enter; enter &= enter - 1) insert(into, count, __shfl_sync(kAllLanes, key, __ffs(int(enter)) - 1));
    }
  };
  for (int split = warp + kMergeWarps; split < splits; split += kMergeWarps)
    merge(lists + warp * count, lists + split * count);
  __syncthreads();
  if (warp > 0) return;
  for (int split = 1; split < min(splits, kMergeWarps); ++split) merge(lists, lists + split * count);
  __syncwarp();
  for (int slot = lane; slot < count; slot += 32) {
    const int64_t key = lists[slot], to = row * count + slot;
    const int order = int(key >> 32);
    if (scaled) static_cast<float *>(values)[to] = ordered_back(order);
    else static_cast<int *>(values)[to] = order;
    index[to] = int64_t(unsigned(~unsigned(key)));
  }
}

template <class Tile> void launch_search(const CudaHammingTopk &p, void *stream) {
  const int64_t blocks = (p.a.rows + Tile::BM - 1) / Tile::BM * p.splits;
  if (blocks > INT32_MAX || p.a.rows > INT32_MAX)
    throw std::runtime_error("hamming_topk on CUDA takes at most 2^31 - 1 rows and blocks");
  const Search s{plane_sums(p.a, p.b.offset),
                 plane_sums(p.b, p.a.offset),
                 unsigned(p.a.columns) * unsigned(p.a.offset) * unsigned(p.b.offset),
                 p.scale,
                 p.keys,
                 p.splits,
                 int(p.count)};
  Launch l;
  l.grid = dim3(unsigned(blocks));
  l.block = dim3(Tile::kThreads);
  l.smem = Tile::kShared;
  l.stream = static_cast<decltype(l.stream)>(stream);
  launch(l, topk_kernel<Tile>, bit_operands(p.a, p.b), s);
  l.grid = dim3(unsigned(p.a.rows));
  l.block = dim3(kMergeWarps * 32);
  l.smem = 0;
  launch(l, merge_kernel, p.keys, p.splits, int(p.count), p.scale != nullptr, p.values, p.index);
}

} // namespace

int hamming_topk_splits(int64_t m, int64_t n, const DeviceLimits &device) {
  const int64_t row_blocks = (m + 127) / 128, wanted = (4 * device.multiprocessors + row_blocks - 1) / row_blocks;
  // A list costs its count of insertions before it refuses anything: a part has some tiles at least.
  return int(std::max<int64_t>(1, std::min(wanted, n / 1024)));
}

void hamming_topk_launch(const CudaHammingTopk &p, bool int8, void *stream) {
  if (p.a.rows == 0 || p.count == 0) return;
  if (int8) launch_search<BitTile<true, 128, 64, 32, 64, 4>>(p, stream);
  else launch_search<BitTile<false, 128, 64, 32, 64, 4>>(p, stream);
}

void hamming_topk_cuda(const CudaHammingTopk &p, int device, void *stream) {
  const DeviceGuard guard(device);
  hamming_topk_launch(p, device_limits(device).capability >= 100, stream);
}

} // namespace fastloss
