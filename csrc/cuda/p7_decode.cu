// lossless_decode of P7 (docs/design.md, "The lossless contract"). A thread block has a block of 16,384 numbers. Its
// codes come to shared memory by cp.async; the bytes beside them go straight to registers, all of them on their way
// before the first is used. The table of pairs lies in shared memory 32 times, once a bank: look-ups never collide. A
// thread has eight numbers at a time, one store of 16 bytes. Then the escapes are written over.
#include "p7_pairs.cuh"

namespace fastloss {
namespace {

constexpr int kThreads = 256, kRounds = kEights / kThreads;
static_assert(kThreads * 8 == kUnit,
              "a round is a unit: lanes t 8 + i of warp g have the numbers of row g and row g + 8");

// Lane 8 t + k of four, t = 0..3, gives its v[u] to lane 8 u + k, there v[t].
__device__ inline void exchange(unsigned (&v)[4], int lane) {
#pragma unroll
  for (int round = 0; round < 2; ++round) {
    const int step = 1 << round;
    const bool upper = lane >> (3 + round) & 1;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k & step) continue;
      const unsigned got = __shfl_xor_sync(kWholeWarp, upper ? v[k] : v[k + step], 8 * step);
      if (upper) v[k] = got;
      else v[k + step] = got;
    }
  }
}

// A warp's 32 times eight numbers of layout tiles are rows g and g + 8 of a unit: each lane gets eight of one row.
template <int NUMBER>
__device__ inline void store_tile(const CudaLosslessDecode &p, int64_t at, int lane,
                                  unsigned (&word)[Parts<NUMBER>::kWords]) {
  constexpr int kEach = Parts<NUMBER>::kBytes / 2; // words of a pair
#pragma unroll
  for (int w = 0; w < kEach; ++w) {
    unsigned v[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) v[r] = word[r * kEach + w];
    exchange(v, lane);
#pragma unroll
    for (int r = 0; r < 4; ++r) word[r * kEach + w] = v[r];
  }
  const int r = lane / 8, i = lane % 8;
  const int64_t unit = at / kUnit, units = p.blob.columns / 128;
  const int64_t row = unit / units * 16 + at % kUnit / 256 + 8 * (r & 1);
  const int64_t place = row * p.blob.columns + unit % units * 128 + 16 * i + 8 * (r >> 1);
  store_eight<NUMBER>(static_cast<typename Parts<NUMBER>::Integer *>(p.out) + (place - p.first), word);
}

template <int NUMBER, bool TILES>
__global__ void __launch_bounds__(kThreads, NUMBER == kBf16 ? TILES ? 5 : 6 : 4)
    decode_kernel(const __grid_constant__ CudaLosslessDecode p) {
  using Integer = typename Parts<NUMBER>::Integer;
  constexpr int kAhead = NUMBER == kBf16 ? kRounds : 2; // rounds whose bytes are under way, in registers
  SHARED_ARRAY(uint4, codes, [kCodeBytes / 16 + 1]);    // the last eight numbers read a word too many
  SHARED_ARRAY(uint4, table, [kPairCodes * 8]);
  const Compressed &c = p.blob;
  const int thread = threadIdx.x, lane = thread % 32;
  const int64_t block = p.first / kLosslessBlock + blockIdx.x, begin = block * kLosslessBlock;
  const int64_t last = p.first + p.count;
  const Window<NUMBER> window(p.out, p.first - begin, int(max(p.first - begin, int64_t(0))),
                              int(min(last - begin, kLosslessBlock)));

  const int pieces = (window.high + 7) / 8 * 7 / 2 / 16 + 1; // of 16 bytes; the last may reach beyond the section
  for (int i = thread; i < min(pieces, kCodeBytes / 16); i += kThreads)
    cp_async16(codes + i, c.codes + block * kCodeBytes + i * 16);
  cp_async_commit();
  Rest<NUMBER> rest[kAhead];
  const auto load = [&](int round, int slot) {
    const int eight = round * kThreads + thread;
    if (window.touches(eight * 8)) rest[slot] = load_rest<NUMBER>(c, block, eight);
  };
#pragma unroll
  for (int r = 0; r < kAhead; ++r) load(r, r);
  for (int i = thread; i < kPairCodes * 8; i += kThreads) {
    const unsigned e = pair_entry<NUMBER>(c.table, i / 8);
    table[i] = make_uint4(e, e, e, e);
  }
  cp_async_wait<0>();
  __syncthreads(); // codes and table

  // The 28 bits of eight numbers begin at the same bit of a word in every round.
  const unsigned *const my_codes = reinterpret_cast<const unsigned *>(codes) + thread * 7 / 8;
  const unsigned shift = unsigned(thread) * 28 % 32;
  const char *const all_tables = reinterpret_cast<const char *>(table);
  const unsigned my_table = unsigned(lane) * 4;
#pragma unroll
  for (int first = 0; first < kRounds; first += kAhead) {
#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot) {
      const int round = first + slot, at = (round * kThreads + thread) * 8;
      if (!window.touches(at)) continue;
      const unsigned *const at_codes = my_codes + round * (kThreads * 7 / 8);
      const unsigned bits = __funnelshift_r(at_codes[0], at_codes[1], shift);
      unsigned word[Parts<NUMBER>::kWords];
      pair_fields<NUMBER>(word, [&](int q) {
        const unsigned code = (q == 0 ? bits << 7 : bits >> (7 * q - 7)) & 127 << 7;
        return *reinterpret_cast<const unsigned *>(all_tables + (code | my_table));
      });
      merge_rest<NUMBER>(word, rest[slot]);
      if (TILES) store_tile<NUMBER>(p, begin + at, lane, word);
      else window.store(at, word);
    }
    if (first + kAhead < kRounds) {
#pragma unroll
      for (int slot = 0; slot < kAhead; ++slot) load(first + kAhead + slot, slot);
    }
  }
  __syncthreads(); // all is stored that an escape may be written over
  put_escapes<NUMBER>(c, block, thread, kThreads, [&](int64_t number, Integer value) {
    if (number < p.first || number >= last) return;
    const int64_t place = TILES ? tile_place(number, c.columns) : number;
    static_cast<Integer *>(p.out)[place - p.first] = value;
  });
}

template <int NUMBER> void launch_number(const Launch &l, const CudaLosslessDecode &p) {
  if (p.blob.layout == kLayoutTiles) launch(l, decode_kernel<NUMBER, true>, p);
  else launch(l, decode_kernel<NUMBER, false>, p);
}

} // namespace

void p7_decode_launch(const CudaLosslessDecode &p, void *stream) {
  if (p.count == 0) return;
  const int64_t blocks = lossless_blocks(p.first + p.count) - p.first / kLosslessBlock;
  if (blocks > INT32_MAX) throw std::runtime_error("lossless_decode on CUDA takes at most 2^31 - 1 blocks");
  Launch l;
  l.grid = dim3(unsigned(blocks));
  l.block = dim3(kThreads);
  l.stream = static_cast<decltype(l.stream)>(stream);
  if (p.blob.number == kBf16) launch_number<kBf16>(l, p);
  else if (p.blob.number == kFp16) launch_number<kFp16>(l, p);
  else launch_number<kFp32>(l, p);
}

void p7_decode_cuda(const CudaLosslessDecode &p, int device, void *stream) {
  const DeviceGuard guard(device);
  p7_decode_launch(p, stream);
}

} // namespace fastloss
