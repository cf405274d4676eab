// The encoder of P7 (docs/design.md, "The lossless contract"): p7_histogram and p7_encode. Encoding is one pass that
// writes codes and planes and counts the escapes of each block, and a second one, when the counts have been summed,
// that lists them: a code of 127 is an escape, so only codes are read again, and the numbers that escape.
#include "lossless_split.cuh"

namespace fastloss {
namespace {

constexpr int kThreads = 256, kPairs = 1 << 16;
constexpr int kWindow = 64; // fields beside each other whose pairs are counted in shared memory

// Pairs of fields of weights crowd together: those of a window are counted in shared memory.
template <int NUMBER>
__global__ void __launch_bounds__(kThreads) histogram_kernel(const __grid_constant__ CudaP7Encode p) {
  SHARED_ARRAY(unsigned, window, [kWindow * kWindow]);
  SHARED_ARRAY(int, corner, [1]);
  for (int i = threadIdx.x; i < kWindow * kWindow; i += kThreads) window[i] = 0;
  const int64_t eights = (p.numel + 7) / 8, pairs = (p.numel + 1) / 2;
  unsigned word[Parts<NUMBER>::kWords];
  if (threadIdx.x == 0) { // the window ends a little above the first field that comes
    load_eight<NUMBER>(word, p.numbers, int64_t(blockIdx.x) * kThreads * 8, p.numel);
    corner[0] = max(0, min(256 - kWindow, int(fields_of<NUMBER>(word).x & 255) - kWindow * 3 / 4));
  }
  __syncthreads(); // zeros and the corner
  const unsigned low = unsigned(corner[0]);
  for (int64_t eight = int64_t(blockIdx.x) * kThreads + threadIdx.x; eight < eights;
       eight += int64_t(gridDim.x) * kThreads) {
    load_eight<NUMBER>(word, p.numbers, eight * 8, p.numel);
    const uint2 fields = fields_of<NUMBER>(word);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (eight * 4 + q >= pairs) break;
      const unsigned pair = (q < 2 ? fields.x : fields.y) >> 16 * (q % 2) & 0xffff;
      const unsigned a = (pair & 255) - low, b = (pair >> 8) - low;
      if (a < kWindow && b < kWindow) atomicAdd(&window[a * kWindow + b], 1u);
      else atomicAdd(p.counts + pair, 1ull);
    }
  }
  __syncthreads(); // all have counted
  for (int i = threadIdx.x; i < kWindow * kWindow; i += kThreads)
    if (window[i]) atomicAdd(p.counts + ((i / kWindow + low) | (i % kWindow + low) << 8), 1ull * window[i]);
}

// The code of each of 65,536 pairs; of equal entries the first counts. One thread block.
__global__ void __launch_bounds__(kThreads) code_kernel(const uint8_t *table, uint8_t *codes_of) {
  SHARED_ARRAY(int, key, [kEscapeCode]);
  const int i = threadIdx.x;
  for (int k = i; k < kPairs / 4; k += kThreads) reinterpret_cast<unsigned *>(codes_of)[k] = 0x7f7f7f7f;
  if (i < kEscapeCode) key[i] = table[i] | table[128 + i] << 8;
  __syncthreads(); // keys, and every pair an escape
  if (i >= kEscapeCode) return;
  bool first = true;
  for (int k = 0; k < i; ++k) first = first && key[k] != key[i];
  if (first) codes_of[key[i]] = uint8_t(i);
}

template <int NUMBER>
__global__ void __launch_bounds__(kThreads) encode_kernel(const __grid_constant__ CudaP7Encode p) {
  constexpr int kEach = Parts<NUMBER>::kBytes / 2; // words of a pair
  SHARED_ARRAY(unsigned, codes, [kThreads + 1]);
  SHARED_ARRAY(unsigned, escapes, [1]);
  const int thread = threadIdx.x;
  const int64_t block = blockIdx.x, begin = block * kLosslessBlock, pairs = (p.numel + 1) / 2;
  const int64_t padded = (p.numel + kLosslessGroup - 1) / kLosslessGroup * kLosslessGroup;
  const int numbers = int(min(kLosslessBlock, padded - begin));
  if (thread == 0) escapes[0] = 0, codes[kThreads] = 0;
  unsigned mine = 0;
  for (int round = 0; round * kUnit < numbers; ++round) {
    const int eight = round * kThreads + thread;
    unsigned bits = 0;
    if (eight * 8 < numbers) {
      unsigned word[Parts<NUMBER>::kWords];
      load_eight<NUMBER>(word, p.numbers, begin + eight * 8, p.numel);
      const uint2 fields = fields_of<NUMBER>(word);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        unsigned code = 0;
        if (begin / 2 + eight * 4 + q < pairs)
          code = __ldg(p.codes_of + ((q < 2 ? fields.x : fields.y) >> 16 * (q % 2) & 0xffff));
        bits |= code << 7 * q;
        if (code != kEscapeCode) continue;
        ++mine;
#pragma unroll
        for (int w = 0; w < kEach; ++w) word[q * kEach + w] = 0;
      }
      store_rest<NUMBER>(p.planes, block, numbers, eight, rest_of<NUMBER>(word));
    }
    codes[thread] = bits;
    __syncthreads(); // 28 bits of every thread
    const int words = min(kUnit, numbers - round * kUnit) / 32 * 7 / 2;
    if (thread < words) { // a word has bits of two threads
      const int from = thread * 8 / 7, offset = thread * 32 - from * 28;
      reinterpret_cast<unsigned *>(
          p.codes + block * (kLosslessBlock / kLosslessGroup * 56))[round * (kThreads * 7 / 8) + thread] =
          codes[from] >> offset | codes[from + 1] << (28 - offset);
    }
    __syncthreads(); // codes are read
  }
  if (mine) atomicAdd(escapes, mine);
  __syncthreads(); // all have counted
  if (thread == 0) p.counts_of_escapes[block] = escapes[0];
}

// The escapes of a block in rising order: a thread has the four pairs of eight numbers.
template <int NUMBER> __global__ void __launch_bounds__(kThreads) list_kernel(const __grid_constant__ CudaP7Encode p) {
  using Integer = typename Parts<NUMBER>::Integer;
  SHARED_ARRAY(int, of_warp, [kThreads / 32]);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t block = blockIdx.x, begin = block * kLosslessBlock;
  if (p.offsets[block] == p.offsets[block + 1]) return;
  const int64_t padded = (p.numel + kLosslessGroup - 1) / kLosslessGroup * kLosslessGroup;
  const int numbers = int(min(kLosslessBlock, padded - begin));
  const auto *const codes =
      reinterpret_cast<const unsigned *>(p.codes + block * (kLosslessBlock / kLosslessGroup * 56));
  const Integer *const from = static_cast<const Integer *>(p.numbers);
  int64_t next = p.offsets[block];
  for (int round = 0; round * kUnit < numbers; ++round) {
    const int eight = round * kThreads + thread;
    unsigned escaped = 0;
    if (eight * 8 < numbers) {
      const int at = eight * 7 / 8, offset = eight * 28 % 32;
      const unsigned bits = codes[at] >> offset | (offset > 4 ? codes[at + 1] << (32 - offset) : 0);
#pragma unroll
      for (int q = 0; q < 4; ++q) escaped |= unsigned((bits >> 7 * q & 127) == kEscapeCode) << q;
    }
    int before = __popc(escaped);
    for (unsigned step = 1; step < 32; step *= 2) {
      const int lower = __shfl_up_sync(kWholeWarp, before, step);
      if (lane >= int(step)) before += lower;
    }
    if (lane == 31) of_warp[warp] = before;
    __syncthreads(); // sums of warps
    int64_t place = next + before - __popc(escaped);
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w < warp) place += of_warp[w];
      next += of_warp[w];
    }
    __syncthreads(); // the sums are read
    for (; escaped; escaped &= escaped - 1, ++place) {
      const int pair = eight * 4 + __ffs(int(escaped)) - 1;
      const int64_t number = begin + 2 * pair;
      p.positions[place] = uint16_t(pair);
      static_cast<Integer *>(p.values)[2 * place] = from[number];
      static_cast<Integer *>(p.values)[2 * place + 1] = number + 1 < p.numel ? from[number + 1] : 0;
    }
  }
}

Launch launch_of(int64_t blocks, void *stream) {
  if (blocks > INT32_MAX) throw std::runtime_error("P7 on CUDA encodes at most 2^31 - 1 blocks");
  Launch l;
  l.grid = dim3(unsigned(blocks));
  l.block = dim3(kThreads);
  l.stream = static_cast<decltype(l.stream)>(stream);
  return l;
}

} // namespace

void p7_histogram_launch(const CudaP7Encode &p, int blocks, void *stream) {
  if (p.numel == 0) return;
  const Launch l = launch_of(std::min<int64_t>(blocks, (p.numel + kUnit - 1) / kUnit), stream);
  if (p.number == kBf16) launch(l, histogram_kernel<kBf16>, p);
  else if (p.number == kFp16) launch(l, histogram_kernel<kFp16>, p);
  else launch(l, histogram_kernel<kFp32>, p);
}

void p7_encode_launch(const CudaP7Encode &p, void *stream) {
  if (p.numel == 0) return;
  launch(launch_of(1, stream), code_kernel, p.table, p.codes_of);
  const Launch l = launch_of(lossless_blocks(p.numel), stream);
  if (p.number == kBf16) launch(l, encode_kernel<kBf16>, p);
  else if (p.number == kFp16) launch(l, encode_kernel<kFp16>, p);
  else launch(l, encode_kernel<kFp32>, p);
}

void p7_escapes_launch(const CudaP7Encode &p, void *stream) {
  if (p.numel == 0) return;
  const Launch l = launch_of(lossless_blocks(p.numel), stream);
  if (p.number == kBf16) launch(l, list_kernel<kBf16>, p);
  else if (p.number == kFp16) launch(l, list_kernel<kFp16>, p);
  else launch(l, list_kernel<kFp32>, p);
}

void p7_histogram_cuda(const CudaP7Encode &p, int device, void *stream) {
  const DeviceGuard guard(device);
  p7_histogram_launch(p, 4 * device_limits(device).multiprocessors, stream);
}

void p7_encode_cuda(const CudaP7Encode &p, int device, void *stream) {
  const DeviceGuard guard(device);
  p7_encode_launch(p, stream);
}

void p7_escapes_cuda(const CudaP7Encode &p, int device, void *stream) {
  const DeviceGuard guard(device);
  p7_escapes_launch(p, stream);
}

} // namespace fastloss
