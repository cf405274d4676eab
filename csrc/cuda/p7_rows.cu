// lossless_rows of P7 (docs/design.md, "The lossless contract"): the groups that a row touches, and nothing else. A
// thread block has up to 16,384 columns of one row; they lie in one block of the sequence or in two.
#include "p7_pairs.cuh"

namespace fastloss {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kSegment = kLosslessBlock;

template <int NUMBER>
__global__ void __launch_bounds__(kThreads) rows_kernel(const __grid_constant__ CudaLosslessRows p) {
  using Integer = typename Parts<NUMBER>::Integer;
  SHARED_ARRAY(unsigned, table, [kPairCodes]);
  const Compressed &c = p.blob;
  const int thread = threadIdx.x;
  const int64_t segments = (c.columns + kSegment - 1) / kSegment;
  const int64_t i = blockIdx.x / segments, column = blockIdx.x % segments * kSegment;
  const int64_t row = p.wide ? static_cast<const int64_t *>(p.index)[i] : static_cast<const int *>(p.index)[i];
  const int count = int(min(kSegment, c.columns - column));
  Integer *const out = static_cast<Integer *>(p.out) + i * c.columns + column;
  if (row < 0 || row >= c.rows) {
    for (int k = thread; k < count; k += kThreads) out[k] = 0;
    return;
  }
  for (int k = thread; k < kPairCodes; k += kThreads) table[k] = pair_entry<NUMBER>(c.table, k);
  __syncthreads();
  const int64_t first = row * c.columns + column, last = first + count;
  for (int64_t block = first / kLosslessBlock; block * kLosslessBlock < last; ++block) {
    const int64_t begin = block * kLosslessBlock;
    const Window<NUMBER> window(out, first - begin, int(max(first - begin, int64_t(0))),
                                int(min(last - begin, kLosslessBlock)));
    const unsigned *const codes = reinterpret_cast<const unsigned *>(c.codes + block * kCodeBytes);
    for (int eight = window.low / 8 + thread; eight * 8 < window.high; eight += kThreads) {
      const unsigned *const at = codes + eight * 7 / 8; // the second word may lie behind the section
      const unsigned bits = __funnelshift_r(__ldg(at), __ldg(at + 1), unsigned(eight) * 28 % 32);
      const Rest<NUMBER> rest = load_rest<NUMBER>(c, block, eight);
      unsigned word[Parts<NUMBER>::kWords];
      pair_fields<NUMBER>(word, [&](int q) { return table[bits >> 7 * q & 127]; });
      merge_rest<NUMBER>(word, rest);
      window.store(eight * 8, word);
    }
  }
  __syncthreads(); // all is stored that an escape may be written over
  for (int64_t block = first / kLosslessBlock; block * kLosslessBlock < last; ++block)
    put_escapes<NUMBER>(c, block, thread, kThreads, [&](int64_t number, Integer value) {
      if (number >= first && number < last) out[number - first] = value;
    });
}

} // namespace

void p7_rows_launch(const CudaLosslessRows &p, void *stream) {
  const int64_t blocks = p.count * ((p.blob.columns + kSegment - 1) / kSegment);
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error("lossless_rows on CUDA takes at most 2^31 - 1 pieces of rows");
  Launch l;
  l.grid = dim3(unsigned(blocks));
  l.block = dim3(kThreads);
  l.stream = static_cast<decltype(l.stream)>(stream);
  if (p.blob.number == kBf16) launch(l, rows_kernel<kBf16>, p);
  else if (p.blob.number == kFp16) launch(l, rows_kernel<kFp16>, p);
  else launch(l, rows_kernel<kFp32>, p);
}

void p7_rows_cuda(const CudaLosslessRows &p, int device, void *stream) {
  const DeviceGuard guard(device);
  p7_rows_launch(p, stream);
}

} // namespace fastloss
