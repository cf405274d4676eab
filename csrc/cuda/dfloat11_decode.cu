// dfloat11_decode: bf16 from exponents in Huffman codes, sign and mantissa raw (csrc/cuda/dfloat11_decode.h).
//
// Threads have 8 bytes of codes each and decode the codes that begin there, twice: once to count them, and once that
// the places are known. A probe of 11 bits gives up to four symbols at once, which for weights is nearly always four
// codes less one; a block makes that table from the look-up tables once, and goes through several blocks of codes.
// Symbols meet in shared memory and leave it eight at a time with their signs and mantissas. Of short codes there may
// be 64 to a thread: they leave in rounds of kRound, so that what a block needs does not depend on the data.
//
// What is damaged gives wrong numbers and nothing else: lengths are held to 1..32, tables to those there are, numbers
// to their block's span, and spans to numel. The first span begins at 0 and the last ends at numel whatever is stored,
// so that between them every number lies in one of them; a number that no code is left for has exponent 0.
//
// What an H200 should take for 8192 x 8192 weights of 2.65 bits: 225 MB are 52 us. A probe has about 3.2 symbols and
// costs some 35 instructions to count and 65 to decode, and a number about 9 to be written: 42 in all, 95 us at 29.6e12
// lanes' instructions a second. 0.11 ms, 1.2 TB/s of bf16.
#include "common.cuh"
#include "dfloat11_decode.h"

#include <algorithm>

namespace fastloss {
namespace {

constexpr int kProbeBits = 11, kAtOnce = 4;
constexpr int kRound = 16384; // symbols that are in shared memory at a time
constexpr int kMostThreads = 1024, kMostTables = 16;
constexpr unsigned kAllLanes = ~0u;

struct Symbol {
  unsigned value;
  int length;
};

// The symbols that begin a window of kProbeBits bits; `count` is 0 where the first is longer than that.
struct Probe {
  unsigned symbols;                        // a byte each
  uint8_t count, bits, last, first_length; // last: where the last of them begins
};

struct Shared {
  Probe probes[1 << kProbeBits];
  uint8_t symbols[kRound + 8];
  unsigned words[kMostThreads * 2 + 2]; // of codes, the first byte highest
  uint8_t luts[(kMostTables + 1) * 256];
  int sums[32]; // of warps
};

// The symbol whose code begins `window`.
__device__ inline Symbol look_up(const uint8_t *luts, int tables, unsigned window) {
  unsigned value = luts[window >> 24];
#pragma unroll
  for (int level = 1; level < 4; ++level)
    if (value >= 240 && 256 - int(value) < tables)
      value = luts[(256 - value) * 256 + (window >> (24 - 8 * level) & 255)];
  return {value, int(luts[tables * 256 + value])};
}

__device__ inline void make_probe(Shared &shared, int tables, int index) {
  Probe probe{};
  int at = 0;
  while (probe.count < kAtOnce) {
    // Bits beyond the probe are unknown: a symbol is right if they make no difference. What it takes two readings to
    // tell is an entry that no code of the text has, and that encoders fill as they please.
    const unsigned window = unsigned(index) << (32 - kProbeBits) << at;
    const Symbol symbol = look_up(shared.luts, tables, window);
    const Symbol same = look_up(shared.luts, tables, window | ((1u << (32 - kProbeBits + at)) - 1));
    if (same.value != symbol.value || symbol.length == 0 || at + symbol.length > kProbeBits) break;
    if (probe.count == 0) probe.first_length = uint8_t(symbol.length);
    probe.symbols |= symbol.value << 8 * probe.count++;
    probe.last = uint8_t(at);
    at += symbol.length;
    if (at == kProbeBits) break;
  }
  probe.bits = uint8_t(at);
  shared.probes[index] = probe;
}

// put(symbols, how many) of every code that begins in bits at..end - 1 of three words.
template <class Put>
__device__ void decode(const Shared &shared, int tables, const unsigned (&word)[3], int at, int end, Put put) {
  while (at < end) {
    const unsigned high = at < 32 ? word[0] : word[1], low = at < 32 ? word[1] : word[2];
    const unsigned window = __funnelshift_l(low, high, at);
    const Probe probe = shared.probes[window >> (32 - kProbeBits)];
    if (probe.count == 0) {
      const Symbol symbol = look_up(shared.luts, tables, window);
      put(symbol.value, 1);
      at += min(max(symbol.length, 1), 32);
    } else if (at + probe.last < end) {
      put(probe.symbols, probe.count);
      at += probe.bits;
    } else { // the last of them are the next thread's
      put(probe.symbols, 1);
      at += probe.first_length;
    }
  }
}

__device__ inline unsigned load_word(const CudaDfloat11 &p, int64_t byte) {
  if (byte + 4 <= p.code_bytes)
    return __byte_perm(__ldg(reinterpret_cast<const unsigned *>(p.codes + byte)), 0, 0x0123);
  unsigned word = 0;
  for (int i = 0; i < 4; ++i) word = word << 8 | (byte + i < p.code_bytes ? p.codes[byte + i] : 0);
  return word;
}

// Where the first code of a thread begins.
__device__ inline int first_bit(const CudaDfloat11 &p, int64_t thread) {
  const int64_t byte = 5 * thread / 8;
  const unsigned high = p.gaps[byte], low = byte + 1 < p.gap_bytes ? p.gaps[byte + 1] : 0;
  return int((high << 8 | low) >> (11 - int(5 * thread % 8)) & 31);
}

// The sum of `count` over the threads before this one; `total` that of all.
__device__ inline int scan(int count, int (&sums)[32], int &total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = count;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += before;
  }
  if (lane == 31) sums[warp] = sum;
  __syncthreads(); // all sums of warps
  total = 0;
  int before = 0;
  for (int w = 0; w < int(blockDim.x) / 32; ++w) {
    if (w == warp) before = total;
    total += sums[w];
  }
  return before + sum - count;
}

__device__ inline unsigned merged(unsigned symbol, unsigned sign_mantissa) {
  return (sign_mantissa & 0x80) << 8 | symbol << 7 | (sign_mantissa & 0x7f);
}

// Numbers begin..end from symbols, of which the first stands at begin % 8.
__device__ inline void write_round(const CudaDfloat11 &p, const uint8_t *symbols, int64_t begin, int64_t end) {
  uint16_t *const out = static_cast<uint16_t *>(p.out);
  const int64_t first = begin / 8 * 8;
  for (int64_t at = first + 8 * threadIdx.x; at < end; at += 8 * blockDim.x) {
    const uint8_t *const from = symbols + (at - first);
    if (at >= begin && at + 8 <= end) {
      const uint2 s = *reinterpret_cast<const uint2 *>(from);
      const uint2 m = __ldcs(reinterpret_cast<const uint2 *>(p.sign_mantissa + at));
      const auto pair = [](unsigned symbols, unsigned rest) { // two numbers of bytes 0 and 1
        return (__byte_perm(rest, 0, 0x1100) & 0x807f807fu) | (symbols & 255) << 7 | (symbols >> 8 & 255) << 23;
      };
      __stcs(reinterpret_cast<uint4 *>(out + at),
             make_uint4(pair(s.x, m.x), pair(s.x >> 16, m.x >> 16), pair(s.y, m.y), pair(s.y >> 16, m.y >> 16)));
    } else {
      for (int i = 0; i < 8; ++i)
        if (at + i >= begin && at + i < end) out[at + i] = uint16_t(merged(from[i], p.sign_mantissa[at + i]));
    }
  }
}

__global__ void __launch_bounds__(kMostThreads)
    dfloat11_decode_kernel(const __grid_constant__ CudaDfloat11 p, const int64_t blocks) {
  SHARED_DYNAMIC(Shared, memory);
  Shared &shared = *memory;
  const int threads = blockDim.x, tables = int(p.tables);
  for (int i = threadIdx.x; i < (tables + 1) * 256; i += threads) shared.luts[i] = p.luts[i];
  __syncthreads(); // the look-up tables
  for (int i = threadIdx.x; i < 1 << kProbeBits; i += threads) make_probe(shared, tables, i);

  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t first_thread = block * threads;
    for (int i = threadIdx.x; i < 2 * threads + 2; i += threads)
      shared.words[i] = load_word(p, first_thread * 8 + 4 * i);
    __syncthreads(); // words, and at first the probes
    const unsigned *const own = shared.words + 2 * threadIdx.x;
    const unsigned word[3] = {own[0], own[1], own[2]};
    const int64_t thread = first_thread + threadIdx.x;
    const int last = int(min(p.code_bytes - thread * 8, int64_t(8))) * 8; // not above 0 behind the codes
    const int at = last > 0 ? first_bit(p, thread) : 0;
    int count = 0, total;
    decode(shared, tables, word, at, last, [&](unsigned, int n) { count += n; });
    const int mine = scan(count, shared.sums, total);

    const int64_t begin = block == 0 ? 0 : min(int64_t(p.output_positions[block]), p.numel);
    const int64_t end = block + 1 == blocks ? p.numel : min(int64_t(p.output_positions[block + 1]), p.numel);
    const int here = int(max(min(end - begin, int64_t(total)), int64_t(0)));
    for (int round = 0; round < here; round += kRound) {
      int next = mine - round;
      decode(shared, tables, word, at, last, [&](unsigned symbols, int n) {
        for (int i = 0; i < n; ++i, ++next, symbols >>= 8)
          if (unsigned(next) < unsigned(kRound)) shared.symbols[next + begin % 8] = uint8_t(symbols);
      });
      __syncthreads(); // the symbols of this round
      write_round(p, shared.symbols, begin + round, begin + min(here, round + kRound));
      __syncthreads(); // before the next overwrites them
    }
    for (int64_t i = begin + here + threadIdx.x; i < end; i += threads)
      static_cast<uint16_t *>(p.out)[i] = uint16_t(merged(0, p.sign_mantissa[i]));
    __syncthreads(); // all have done with words and sums
  }
}

} // namespace

void dfloat11_decode_launch(const CudaDfloat11 &p, int multiprocessors, void *stream) {
  const int64_t blocks = (p.code_bytes + 8 * p.threads - 1) / (8 * p.threads);
  if (blocks == 0) return;
  Launch l;
  l.grid = dim3(unsigned(std::min<int64_t>(blocks, 4 * multiprocessors)));
  l.block = dim3(unsigned(p.threads));
  l.smem = sizeof(Shared);
  l.stream = static_cast<decltype(l.stream)>(stream);
  launch(l, dfloat11_decode_kernel, p, blocks);
}

void dfloat11_decode_cuda(const CudaDfloat11 &p, int device, void *stream) {
  const DeviceGuard guard(device);
  dfloat11_decode_launch(p, device_limits(device).multiprocessors, stream);
}

} // namespace fastloss
