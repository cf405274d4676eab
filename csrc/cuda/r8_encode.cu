// The encoder of R8 (docs/design.md, "The lossless contract"): byte_split, byte_histogram and r8_encode. A warp encodes
// a block, from its last step to its first: the stream grows backwards from the end of its scratch, the literals of
// escapes forwards from the start of theirs. When the lengths have been summed, a second pass moves both to their
// place.
#include "lossless_split.cuh"
#include "r8_slots.cuh"

namespace fastloss {
namespace {

constexpr int kThreads = 256, kWarps = 4;

template <int NUMBER>
__global__ void __launch_bounds__(kThreads)
    split_kernel(const void *const numbers, const int64_t numel, uint8_t *const field,
                 const __grid_constant__ SplitPlanes planes) {
  const int64_t padded = (numel + kLosslessGroup - 1) / kLosslessGroup * kLosslessGroup;
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 8, block = at / kLosslessBlock;
  if (at >= padded) return;
  unsigned word[Parts<NUMBER>::kWords];
  load_eight<NUMBER>(word, numbers, at, numel);
  *reinterpret_cast<uint2 *>(field + at) = fields_of<NUMBER>(word);
  store_rest<NUMBER>(planes, block, int(min(kLosslessBlock, padded - block * kLosslessBlock)),
                     int(at % kLosslessBlock / 8), rest_of<NUMBER>(word));
}

// Each warp counts for itself in shared memory.
__global__ void __launch_bounds__(kThreads)
    histogram_kernel(const uint8_t *const plane, const int64_t numel, unsigned long long *const counts) {
  SHARED_ARRAY(unsigned, count, [kThreads / 32][kSlots]);
  for (int i = threadIdx.x; i < kThreads / 32 * kSlots; i += kThreads) (&count[0][0])[i] = 0;
  __syncthreads(); // zeros
  unsigned *const mine = count[threadIdx.x / 32];
  for (int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 8; at < numel;
       at += int64_t(gridDim.x) * kThreads * 8) {
    const uint2 eight = __ldcs(reinterpret_cast<const uint2 *>(plane + at)); // padded to a group
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (at + k < numel) atomicAdd(mine + ((k < 4 ? eight.x : eight.y) >> 8 * (k % 4) & 255), 1u);
  }
  __syncthreads(); // all have counted
  unsigned sum = 0;
  for (int w = 0; w < kThreads / 32; ++w) sum += count[w][threadIdx.x];
  if (sum) atomicAdd(counts + threadIdx.x, 1ull * sum);
}

__global__ void __launch_bounds__(kWarps * 32) encode_kernel(const __grid_constant__ CudaR8Encode p) {
  SHARED_ARRAY(unsigned, table, [kSlots]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Start | frequency << 16 of the 256 bytes; a byte without slots has those of the escape, and kEscape.
  if (warp == 0)
    deal_slots(p.frequencies, lane, [&](unsigned symbol, unsigned f, unsigned start, unsigned total) {
      table[symbol] = f ? start | f << 16 : kEscape | total | (kSlots - min(total, 255u)) << 16;
    });
  __syncthreads(); // table
  const int64_t block = int64_t(blockIdx.x) * kWarps + warp, begin = block * kLosslessBlock;
  if (begin >= p.numel) return;
  const int numbers = int(min(kLosslessBlock, p.numel - begin)), steps = (numbers + kRansLanes - 1) / kRansLanes;
  uint8_t *const scratch = p.scratch + block * kR8Scratch;
  uint8_t *const literals = scratch + kStateBytes, *const stream = literals + kLosslessBlock;
  const unsigned below = (1u << lane) - 1;
  unsigned x = 256;
  int emitted = int(kLosslessBlock), escaped = 0; // the stream's first byte; how many literals
  for (int step = steps - 1; step >= 0; --step) {
    const int at = step * kRansLanes + lane;
    const unsigned symbol = at < numbers ? __ldg(p.plane + begin + at) : 0, entry = table[symbol];
    const unsigned f = entry >> 16 & 511, start = entry & 511;
    const bool full = x >= f << 8, escape = entry >= kEscape;
    const unsigned fulls = __ballot_sync(kWholeWarp, full), escapes = __ballot_sync(kWholeWarp, escape);
    emitted -= __popc(fulls);
    if (full) {
      stream[emitted + __popc(fulls & below)] = uint8_t(x);
      x >>= 8;
    }
    x = x / f * 256 + x % f + start;
    // They are read backwards, so the highest lane's comes first.
    if (escape) literals[escaped + __popc(escapes) - 1 - __popc(escapes & below)] = uint8_t(symbol);
    escaped += __popc(escapes);
  }
  scratch[2 * lane] = uint8_t(x);
  scratch[2 * lane + 1] = uint8_t(x >> 8);
  if (lane == 0) {
    p.lengths[block] = kStateBytes + (kLosslessBlock - emitted) + escaped;
    p.literals[block] = escaped;
  }
}

// States, stream and literals of a block to their place.
__global__ void __launch_bounds__(kThreads) move_kernel(const __grid_constant__ CudaR8Encode p) {
  const int64_t block = blockIdx.x, begin = p.offsets[block];
  const int length = int(p.offsets[block + 1] - begin), literals = p.literals[block];
  const uint8_t *const scratch = p.scratch + block * kR8Scratch;
  const int stream = length - kStateBytes - literals;
  for (int i = threadIdx.x; i < length; i += kThreads) {
    const int at = i - kStateBytes;
    const uint8_t *from = scratch + i;
    if (at >= stream) from = scratch + kStateBytes + (at - stream);
    else if (at >= 0) from = scratch + kR8Scratch - stream + at;
    p.data[begin + i] = __ldg(from);
  }
}

Launch launch_of(int64_t blocks, int threads, void *stream) {
  if (blocks > INT32_MAX) throw std::runtime_error("R8 on CUDA encodes at most 2^31 - 1 blocks");
  Launch l;
  l.grid = dim3(unsigned(blocks));
  l.block = dim3(unsigned(threads));
  l.stream = static_cast<decltype(l.stream)>(stream);
  return l;
}

} // namespace

void byte_split_launch(const CudaByteSplit &p, void *stream) {
  if (p.numel == 0) return;
  const Launch l = launch_of((p.numel + kThreads * 8 - 1) / (kThreads * 8), kThreads, stream);
  const auto run = [&](auto kernel) { launch(l, kernel, p.numbers, p.numel, p.field, p.planes); };
  if (p.number == kBf16) run(split_kernel<kBf16>);
  else if (p.number == kFp16) run(split_kernel<kFp16>);
  else if (p.number == kFp32) run(split_kernel<kFp32>);
  else if (p.number == kE4m3) run(split_kernel<kE4m3>);
  else run(split_kernel<kE5m2>);
}

void byte_histogram_launch(const uint8_t *plane, int64_t numel, unsigned long long *counts, int blocks, void *stream) {
  if (numel == 0) return;
  const int64_t most = (numel + kThreads * 8 - 1) / (kThreads * 8);
  launch(launch_of(std::min<int64_t>(blocks, most), kThreads, stream), histogram_kernel, plane, numel, counts);
}

void r8_encode_launch(const CudaR8Encode &p, void *stream) {
  if (p.numel == 0) return;
  launch(launch_of((lossless_blocks(p.numel) + kWarps - 1) / kWarps, kWarps * 32, stream), encode_kernel, p);
}

void r8_move_launch(const CudaR8Encode &p, void *stream) {
  if (p.numel == 0) return;
  launch(launch_of(lossless_blocks(p.numel), kThreads, stream), move_kernel, p);
}

void byte_split_cuda(const CudaByteSplit &p, int device, void *stream) {
  const DeviceGuard guard(device);
  byte_split_launch(p, stream);
}

void byte_histogram_cuda(const uint8_t *plane, int64_t numel, unsigned long long *counts, int device, void *stream) {
  const DeviceGuard guard(device);
  byte_histogram_launch(plane, numel, counts, 4 * device_limits(device).multiprocessors, stream);
}

void r8_encode_cuda(const CudaR8Encode &p, int device, void *stream) {
  const DeviceGuard guard(device);
  r8_encode_launch(p, stream);
}

void r8_move_cuda(const CudaR8Encode &p, int device, void *stream) {
  const DeviceGuard guard(device);
  r8_move_launch(p, stream);
}

} // namespace fastloss
