// hamming_topk (docs/design.md, "The bit contract"): no [M, N] matrix. A block has 128 rows of a and goes along a part
// of b in tiles of bit_tiles.cuh; a warp keeps the best of its 32 rows. A candidate is one integer that orders as the
// result does, its score in the upper half and its column, falling, in the lower: no two are equal, so the order in
// which they come does not matter, and equal scores go to the lowest column. The lists lie in `keys`, that is in L1;
// only scores above the last of a row's list are looked at again, which soon are few: about count log(N / count) of N.
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
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    topk_kernel(const __grid_constant__ BitOperands p, const __grid_constant__ Search s) {
  static_assert(Tile::WN == Tile::BN && Tile::BN == 64 && Tile::WM == 32, "a warp has whole rows, a lane one of them");
  const int split = int(blockIdx.x) % s.splits;
  const int64_t m0 = int64_t(blockIdx.x) / s.splits * Tile::BM;
  const int64_t tiles = (p.n + Tile::BN - 1) / Tile::BN, each = (tiles + s.splits - 1) / s.splits;
  const int64_t begin = min(p.n, split * each * Tile::BN), end = min(p.n, (split + 1) * each * Tile::BN);
  SHARED_DYNAMIC(uint4, stages);
  BitStream<Tile> stream(p, stages, m0, begin, end);
  const TileSums<Tile> tile{reinterpret_cast<int *>(stages + Tile::kShared / 16)};

  // Only this warp ever touches the sums and the lists of its rows; a lane knows of the row with its number.
  const int lane = threadIdx.x % 32, r0 = threadIdx.x / 32 * Tile::WM;
  const int rows = int(max(int64_t(0), min(int64_t(Tile::WM), p.m - m0 - r0)));
  int64_t *const lists = s.keys + ((m0 + r0) * s.splits + split) * s.count;
  const int64_t pitch = int64_t(s.splits) * s.count;
  for (int r = 0; r < rows; ++r)
    for (int slot = lane; slot < s.count; slot += 32) lists[r * pitch + slot] = kAbsent;
  const unsigned my_sum = lane < rows ? s.constant + s.a_sums(m0 + r0 + lane) : 0;
  int my_worst = int(kAbsent >> 32); // the score of the last in the list: what comes later has to be better
  __syncwarp();

  for (int64_t n0 = begin; n0 < end; n0 += Tile::BN) {
    const int64_t column = n0 + lane * 2; // and the next one
    unsigned column_sum[2];
    float scale[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      column_sum[c] = column + c < end ? s.b_sums(column + c) : 0;
      scale[c] = column + c < end && s.scale ? __ldg(s.scale + column + c) : 1;
    }
    typename Tile::Sums sums;
    stream.tile(sums);
    __syncwarp(); // the tile before has been looked at
    tile.put(sums, p.pairs.last);
    __syncwarp();
#pragma unroll 4
    for (int r = 0; r < rows; ++r) {
      const int2 two = *reinterpret_cast<const int2 *>(tile.at(r0 + r, lane * 2));
      const unsigned row_sum = __shfl_sync(kAllLanes, my_sum, r);
      const int worst = __shfl_sync(kAllLanes, my_worst, r);
      int score[2] = {int(unsigned(two.x) + row_sum + column_sum[0]), int(unsigned(two.y) + row_sum + column_sum[1])};
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (s.scale) score[c] = ordered(__fmul_rn(__int2float_rn(score[c]), scale[c]));
        if (column + c >= end) score[c] = INT32_MIN;
      }
      unsigned waiting = __ballot_sync(kAllLanes, max(score[0], score[1]) > worst);
      if (waiting == 0) continue;
      int64_t *const list = lists + r * pitch;
      for (; waiting; waiting &= waiting - 1) {
        const int owner = __ffs(int(waiting)) - 1;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int found = __shfl_sync(kAllLanes, score[c], owner);
          if (found > worst) insert(list, s.count, key_of(found, n0 + owner * 2 + c));
        }
      }
      if (lane == r) my_worst = int(list[s.count - 1] >> 32);
    }
  }
}

// The lists of the parts of b become one: a block has a row; a warp merges every kMergeWarps-th list into its first
// one.
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
  __syncthreads(); // all lists but the first few are in these
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
  l.smem = Tile::kShared + TileSums<Tile>::kBytes;
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

void hamming_topk_cuda(const CudaHammingTopk &p, int plan, int device, void *stream) {
  const DeviceGuard guard(device);
  const bool int8 = plan == kAutomatic ? device_limits(device).capability >= 100 : (plan & 4) != 0;
  hamming_topk_launch(p, int8, stream);
}

} // namespace fastloss
