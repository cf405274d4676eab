// docs/design.md, "The lossless contract": x Wᵀ of a matrix in P7. An escaped pair decodes to zeros, so that the
// product of the codes needs no branch; the list of escapes is added to it. A thread takes 16 rows of W at a time and
// each is decoded once: a matrix costs the reading of its codes. Sums are fp32, in an order that no number of threads
// changes.
#include "lossless_linear.h"
#include "linear_cross_entropy.h"
#include "lossless_blocks.h"
#include "lossless_linear_bf16.h"
#include "simd.h"

#include <vector>

namespace fastloss {
namespace {

void nothing() {}

} // namespace

#define FASTLOSS_WITHOUT_BF16
#define FASTLOSS_LOOPS "lossless_linear.inc"
#include "each_isa.inc"
#undef FASTLOSS_LOOPS

namespace {

constexpr int64_t kFewRows = 4; // of x, that dot products serve as fast as memory brings W

LinearEngine engine_for(int64_t n, int isa) {
#ifdef __x86_64__
  const int level = level_for(isa);
  const bool bytes = byte_isa(isa) == kAvx512Bytes;
  if (level == kAvx512Bf16 && bytes) {
    const bool tiles = isa == kBestIsa && n > kFewRows && linear::has_amx_bf16();
    return tiles ? avx512vbmi::tile_engine(n) : avx512vbmi::dot_engine();
  }
  if (level >= kAvx512)
    return bytes ? avx512::fp32_engine<avx512vbmi::p7_fields>() : avx512::fp32_engine<avx2::p7_fields>();
  if (level == kAvx2) return avx2::fp32_engine<avx2::p7_fields>();
#endif
  (void)n, (void)isa;
  return scalar::fp32_engine<scalar::p7_fields>();
}

float wide(uint16_t x) { return to_float(BFloat16{x}); }

// Adds the escapes of rows first..first+count of W to their sums.
void add_escapes(const LosslessLinear &args, int64_t first, int64_t count, float *sums) {
  const Compressed &w = args.weight;
  if (!w.escapes) return;
  const int64_t begin = first * w.columns, end = begin + count * w.columns;
  const uint16_t *values = static_cast<const uint16_t *>(w.escape_values);
  for (int64_t b = begin / kLosslessBlock; b * kLosslessBlock < end; ++b) {
    const uint64_t from = std::min(w.escape_offsets[b], uint64_t(w.escapes));
    const uint64_t most = std::min(from + kLosslessBlock / 2, uint64_t(w.escapes)); // a block has no more pairs
    for (uint64_t e = from; e < std::min(w.escape_offsets[b + 1], most); ++e) {
      const int64_t place = 2 * int64_t(w.escape_positions[e]), at = b * kLosslessBlock + place - begin;
      if (place >= kLosslessBlock || at < 0 || at >= end - begin) continue;
      const int64_t row = at / w.columns, column = at % w.columns; // and its neighbour: columns are even
      const float low = wide(values[2 * e]), high = wide(values[2 * e + 1]);
      for (int64_t i = 0; i < args.n; ++i) {
        const uint16_t *x = args.x + i * w.columns + column;
        sums[i * kRowsAtOnce + row] += low * wide(x[0]) + high * wide(x[1]);
      }
    }
  }
}

void write(const LosslessLinear &args, int64_t first, int64_t count, const float *sums) {
  for (int64_t i = 0; i < args.n; ++i)
    for (int64_t r = 0; r < count; ++r) {
      const float bias = args.bias ? wide(args.bias[first + r]) : 0.f;
      BFloat16 rounded;
      from_float(rounded, sums[i * kRowsAtOnce + r] + bias);
      args.out[i * args.weight.rows + first + r] = rounded.bits;
    }
}

} // namespace

bool lossless_linear_cpu(const LosslessLinear &args, int isa) {
  const Compressed &w = args.weight;
  for (int64_t i = 0; i < args.n * w.columns; ++i)
    if ((args.x[i] & 0x7f80) == 0x7f80) return false;
  const LinearEngine engine = engine_for(args.n, isa);
  const int64_t laid_rows = (args.n + engine.step - 1) / engine.step * engine.step;
  std::vector<uint8_t> laid(size_t(laid_rows * w.columns * engine.item));
  engine.lay(args.x, args.n, w.columns, laid.data());
  const std::vector<uint8_t> zeros(w.bytes[0] ? 0 : size_t(w.columns)); // a byte plane that is all 0 is not stored
  const int64_t tasks = (w.rows + kRowsAtOnce - 1) / kRowsAtOnce;
  const int threads = w.numel * args.n <= kFewNumbers ? 1 : int(std::min<int64_t>(omp_get_max_threads(), tasks));
  const int64_t room_bytes = engine.room(w.columns), sums_bytes = laid_rows * kRowsAtOnce * int64_t(sizeof(float));
  const ThreadRoom room(threads, (room_bytes + 63) / 64 * 64 + sums_bytes);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    uint8_t *own = room.of(omp_get_thread_num());
    float *sums = reinterpret_cast<float *>(own + (room_bytes + 63) / 64 * 64);
    engine.begin();
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t first = task * kRowsAtOnce, count = std::min<int64_t>(kRowsAtOnce, w.rows - first);
      const CodedRows rows = {w.table,
                              w.codes + first * w.columns / kLosslessGroup * kP7GroupBytes,
                              w.bytes[0] ? w.bytes[0] + first * w.columns : zeros.data(),
                              w.columns,
                              w.bytes[0] ? w.columns : 0,
                              int(count)};
      engine.multiply(rows, laid.data(), args.n, own, sums);
      add_escapes(args, first, count, sums);
      write(args, first, count, sums);
    }
    engine.end();
  }
  return true;
}

} // namespace fastloss
