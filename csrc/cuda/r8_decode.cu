// lossless_decode and lossless_rows of R8 (docs/design.md, "The lossless contract"). A warp has a block: lane l has
// rANS state l. A look-up gives symbol, frequency and bias of a slot at once; the lanes that need a byte find theirs by
// a ballot, and so do those whose symbol is an escape. Eight steps are 256 bytes of shared memory, from which each lane
// takes eight numbers and puts the raw planes beside them: one store of 16 bytes. The planes of a number that are coded
// are decoded side by side, and no plane is ever written to memory.
#include "r8_slots.cuh"

namespace fastloss {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * 32, kSteps = 8, kBatch = kSteps * kRansLanes;

// The 256 slots of a plane, by a warp: symbol, slot - start << 8, frequency << 16, perhaps kEscape. Frequencies whose
// sum is beyond 256 are cut off there.
__device__ inline void build_slots(unsigned *slots, const uint8_t *frequencies, int lane) {
  const unsigned total = deal_slots(frequencies, lane, [&](unsigned symbol, unsigned f, unsigned first, unsigned) {
    for (unsigned i = 0; i < f && first + i < kSlots; ++i) slots[first + i] = symbol | i << 8 | f << 16;
  });
  for (unsigned i = total + lane; i < kSlots; i += 32) slots[i] = kEscape | (i - total) << 8 | (kSlots - total) << 16;
}

// One lane of a block's rANS stream. All but x is the same in every lane.
struct Stream {
  const uint8_t *payload;
  unsigned x;
  int cursor, literal, length;

  // Offsets are clamped to the data. What is read beyond a payload lies within 64 bytes of the section's end.
  __device__ void open(const RansPlane &plane, int64_t block, int lane) {
    const auto bound = [&](int64_t at) {
      return max(int64_t(0),
                 min(plane.data_bytes, int64_t(__ldg(reinterpret_cast<const long long *>(plane.offsets) + at))));
    };
    const int64_t begin = bound(block);
    payload = plane.data + begin;
    length = int(min(max(bound(block + 1) - begin, int64_t(0)), int64_t(INT32_MAX / 2)));
    x = __ldg(payload + 2 * lane) | __ldg(payload + 2 * lane + 1) << 8;
    cursor = min(kStateBytes, length);
    literal = length;
  }

  // The next symbol; `below` has the bits of lower lanes.
  __device__ unsigned step(const unsigned *slots, unsigned below) {
    const unsigned slot = slots[x & 255];
    x = (slot >> 16 & 511) * (x >> 8) + (slot >> 8 & 255);
    const bool hungry = x < 256;
    const unsigned hungers = __ballot_sync(kWholeWarp, hungry);
    if (hungry) x = x << 8 | __ldg(payload + min(cursor + __popc(hungers & below), length));
    cursor = min(cursor + __popc(hungers), length);
    const bool escaped = slot >= kEscape;
    const unsigned escapes = __ballot_sync(kWholeWarp, escaped);
    unsigned symbol = slot & 255;
    if (escapes) {
      if (escaped) symbol = __ldg(payload + max(literal - 1 - __popc(escapes & below), 0));
      literal = max(literal - __popc(escapes), 0);
    }
    return symbol;
  }
};

// Tables of all coded planes and, for each warp, the bytes of eight steps of each.
template <int NUMBER> struct Shared {
  static constexpr int kPlanes = 1 + Parts<NUMBER>::kPlanes; // the field first
  unsigned slots[kPlanes][kSlots];
  uint2 bytes[kWarps][kPlanes][kBatch / 8];
};

template <int NUMBER> __device__ inline void build_tables(const Compressed &c, Shared<NUMBER> &shared) {
  static_assert(Shared<NUMBER>::kPlanes <= kWarps, "a warp builds a table");
  const int warp = threadIdx.x / 32;
  if (warp < Shared<NUMBER>::kPlanes && c.coded[warp].data)
    build_slots(shared.slots[warp], c.coded[warp].frequencies, threadIdx.x % 32);
  __syncthreads(); // tables
}

// Fields that fill eight bytes, each in its place.
template <int NUMBER> __device__ inline void place_fields(unsigned (&word)[Parts<NUMBER>::kWords], uint2 fields) {
  if constexpr (NUMBER == kBf16 || NUMBER == kFp16) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const unsigned pair = __byte_perm(q < 2 ? fields.x : fields.y, 0, q % 2 ? 0x4342 : 0x4140);
      word[q] = NUMBER == kBf16 ? pair << 7 : pair << 10 & 0x7c007c00;
    }
  } else if constexpr (NUMBER == kFp32) {
#pragma unroll
    for (int k = 0; k < 8; ++k) word[k] = ((k < 4 ? fields.x : fields.y) >> 8 * (k % 4) & 255) << 23;
  } else {
    const unsigned mask = NUMBER == kE4m3 ? 0x0f0f0f0f : 0x1f1f1f1f;
    word[0] = (fields.x & mask) << (NUMBER == kE4m3 ? 3 : 2);
    word[1] = (fields.y & mask) << (NUMBER == kE4m3 ? 3 : 2);
  }
}

// Decodes a block up to the window's end and stores what lies in it.
template <int NUMBER>
__device__ inline void decode_block(const Compressed &c, Shared<NUMBER> &shared, int64_t block,
                                    const Window<NUMBER> &window) {
  constexpr int kPlanes = Shared<NUMBER>::kPlanes;
  const int lane = threadIdx.x % 32;
  const unsigned below = (1u << lane) - 1;
  auto &bytes = shared.bytes[threadIdx.x / 32];
  Stream stream[kPlanes];
#pragma unroll
  for (int p = 0; p < kPlanes; ++p)
    if (c.coded[p].data) stream[p].open(c.coded[p], block, lane);
  const int steps = int((min(kLosslessBlock, c.numel - block * kLosslessBlock) + kRansLanes - 1) / kRansLanes);
  for (int first = 0; first * kRansLanes < window.high; first += kSteps) {
    const int at = first * kRansLanes + lane * 8;
    Rest<NUMBER> rest = {};
    if (window.touches(at)) rest = load_rest<NUMBER>(c, block, at / 8);
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      if (!c.coded[p].data) continue;
      uint8_t *const to = reinterpret_cast<uint8_t *>(bytes[p]) + lane;
      if (first + kSteps <= steps) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) to[k * kRansLanes] = uint8_t(stream[p].step(shared.slots[p], below));
      } else
        for (int k = 0; first + k < steps; ++k) to[k * kRansLanes] = uint8_t(stream[p].step(shared.slots[p], below));
    }
    __syncwarp(); // bytes are there
    if (window.touches(at)) {
      unsigned word[Parts<NUMBER>::kWords];
      place_fields<NUMBER>(word, bytes[0][lane]);
#pragma unroll
      for (int p = 1; p < kPlanes; ++p)
        if (c.coded[p].data) rest.bytes[p - 1] = bytes[p][lane];
      merge_rest<NUMBER>(word, rest);
      window.store(at, word);
    }
    __syncwarp(); // bytes are read
  }
}

template <int NUMBER>
__global__ void __launch_bounds__(kThreads, 8) decode_kernel(const __grid_constant__ CudaLosslessDecode p) {
  SHARED_ARRAY(Shared<NUMBER>, shared, );
  build_tables<NUMBER>(p.blob, shared);
  const int64_t block = p.first / kLosslessBlock + int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t begin = block * kLosslessBlock, last = p.first + p.count;
  if (begin >= last) return;
  decode_block<NUMBER>(p.blob, shared, block,
                       Window<NUMBER>(p.out, p.first - begin, int(max(p.first - begin, int64_t(0))),
                                      int(min(last - begin, kLosslessBlock))));
}

// The blocks that a row of so many columns may touch.
__host__ __device__ inline int64_t row_blocks(int64_t columns) { return (columns - 1) / kLosslessBlock + 2; }

// A warp has a row and one of the blocks that it touches.
template <int NUMBER>
__global__ void __launch_bounds__(kThreads, 8) rows_kernel(const __grid_constant__ CudaLosslessRows p) {
  SHARED_ARRAY(Shared<NUMBER>, shared, );
  const Compressed &c = p.blob;
  build_tables<NUMBER>(c, shared);
  const int64_t job = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t i = job / row_blocks(c.columns), piece = job % row_blocks(c.columns);
  if (i >= p.count) return;
  const int64_t row = p.wide ? static_cast<const int64_t *>(p.index)[i] : static_cast<const int *>(p.index)[i];
  auto *const out = static_cast<typename Parts<NUMBER>::Integer *>(p.out) + i * c.columns;
  if (row < 0 || row >= c.rows) {
    for (int64_t k = piece * 32 + threadIdx.x % 32; k < c.columns; k += 32 * row_blocks(c.columns)) out[k] = 0;
    return;
  }
  const int64_t first = row * c.columns, last = first + c.columns, block = first / kLosslessBlock + piece;
  const int64_t begin = block * kLosslessBlock;
  if (begin >= last) return;
  decode_block<NUMBER>(
      c, shared, block,
      Window<NUMBER>(out, first - begin, int(max(first - begin, int64_t(0))), int(min(last - begin, kLosslessBlock))));
}

template <class F> void for_number(int number, F f) {
  if (number == kBf16) f(std::integral_constant<int, kBf16>());
  else if (number == kFp16) f(std::integral_constant<int, kFp16>());
  else if (number == kFp32) f(std::integral_constant<int, kFp32>());
  else if (number == kE4m3) f(std::integral_constant<int, kE4m3>());
  else f(std::integral_constant<int, kE5m2>());
}

Launch launch_of(int64_t warps, void *stream) {
  const int64_t blocks = (warps + kWarps - 1) / kWarps;
  if (blocks > INT32_MAX) throw std::runtime_error("R8 on CUDA decodes at most 2^33 - 4 blocks at once");
  Launch l;
  l.grid = dim3(unsigned(blocks));
  l.block = dim3(kThreads);
  l.stream = static_cast<decltype(l.stream)>(stream);
  return l;
}

} // namespace

void r8_decode_launch(const CudaLosslessDecode &p, void *stream) {
  if (p.count == 0) return;
  const Launch l = launch_of(lossless_blocks(p.first + p.count) - p.first / kLosslessBlock, stream);
  for_number(p.blob.number, [&](auto number) { launch(l, decode_kernel<decltype(number)::value>, p); });
}

void r8_rows_launch(const CudaLosslessRows &p, void *stream) {
  if (p.count == 0 || p.blob.columns == 0) return;
  const Launch l = launch_of(p.count * row_blocks(p.blob.columns), stream);
  for_number(p.blob.number, [&](auto number) { launch(l, rows_kernel<decltype(number)::value>, p); });
}

void r8_decode_cuda(const CudaLosslessDecode &p, int device, void *stream) {
  const DeviceGuard guard(device);
  r8_decode_launch(p, stream);
}

void r8_rows_cuda(const CudaLosslessRows &p, int device, void *stream) {
  const DeviceGuard guard(device);
  r8_rows_launch(p, stream);
}

} // namespace fastloss
