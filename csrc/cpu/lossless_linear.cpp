// docs/design.md, "The lossless contract": x Wᵀ of a matrix in P7. An escaped pair decodes to zeros, so that the
// product of the codes needs no branch; the list of escapes is added to it. A thread takes some rows of W at a time and
// each is decoded once: a matrix costs the reading of its codes. Sums are fp32, in an order that no number of threads
// changes.
#include "lossless_linear.h"
#include "linear_cross_entropy.h"
#include "lossless_blocks.h"
#include "lossless_linear_dots.h"
#include "lossless_linear_tiles.h"

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

constexpr int64_t kFewRows = 1; // of x, that dot products serve as fast as memory brings W

LinearEngine engine_for(int64_t n, int isa) {
#ifdef __x86_64__
  const int level = level_for(isa);
  const bool bytes = byte_isa(isa) == kAvx512Bytes;
  if (level == kAvx512Bf16 && bytes) {
    const bool tiles = isa == kBestIsa && n > kFewRows && linear::has_amx_bf16();
    return tiles ? avx512vbmi::tile_engine() : avx512vbmi::dot_engine();
  }
  if (level >= kAvx512)
    return bytes ? avx512::fp32_engine<avx512vbmi::p7_fields>() : avx512::fp32_engine<avx2::p7_fields>();
  if (level == kAvx2) return avx2::fp32_engine<avx2::p7_fields>();
#endif
  (void)n, (void)isa;
  return scalar::fp32_engine<scalar::p7_fields>();
}

// The escapes of one block in the list.
struct EscapeRange {
  int64_t begin, end;
};
EscapeRange escapes_of_block(const Compressed &w, int64_t block) {
  const uint64_t all = uint64_t(w.escapes), begin = std::min(w.escape_offsets[block], all);
  const uint64_t most = std::min(begin + kLosslessBlock / 2, all); // a block has no more pairs
  return {int64_t(begin), int64_t(std::min(w.escape_offsets[block + 1], most))};
}

// Numbers begin..end of W.
struct NumberRange {
  int64_t begin, end;
};

// Asks memory for the escapes of `numbers`, long before they are added. Always inlined: GCC drops calls of a function
// that does nothing but prefetch.
__attribute__((always_inline)) inline void ask_for_escapes(const Compressed &w, NumberRange numbers) {
  if (!w.escapes) return;
  const int64_t first = numbers.begin / kLosslessBlock, last = (numbers.end - 1) / kLosslessBlock;
  __builtin_prefetch(w.escape_offsets + last + 1 + (last - first) + 1); // of the next rows
  const int64_t begin = escapes_of_block(w, first).begin;
  const int64_t end = std::min(escapes_of_block(w, last).end, begin + (numbers.end - numbers.begin) / 2);
  for (int64_t e = begin; e < end; e += 32) __builtin_prefetch(w.escape_positions + e);
  for (int64_t e = begin; e < end; e += 16) __builtin_prefetch(static_cast<const uint32_t *>(w.escape_values) + e);
}

// Adds the escapes of `numbers`, whole rows of W, to the sums of these rows.
void add_escapes(const Compressed &w, const LinearEngine &engine, const LaidRows &x, NumberRange numbers, float *sums) {
  if (!w.escapes) return;
  constexpr int kMost = 64;
  EscapedPair pairs[kMost];
  int count = 0;
  const uint16_t *values = static_cast<const uint16_t *>(w.escape_values);
  for (int64_t b = numbers.begin / kLosslessBlock; b * kLosslessBlock < numbers.end; ++b) {
    const EscapeRange escapes = escapes_of_block(w, b);
    for (int64_t e = escapes.begin; e < escapes.end; ++e) {
      const int64_t place = 2 * int64_t(w.escape_positions[e]), at = b * kLosslessBlock + place - numbers.begin;
      if (place >= kLosslessBlock || at < 0 || at >= numbers.end - numbers.begin) continue;
      const int64_t row = at / w.columns; // and that of its neighbour: columns are even
      pairs[count++] = {row * x.stride, at % w.columns, wide(values[2 * e]), wide(values[2 * e + 1])};
      if (count == kMost) engine.add_pairs(x, pairs, count, sums), count = 0;
    }
  }
  engine.add_pairs(x, pairs, count, sums);
}

constexpr int kFewThreads = 4; // laying x out takes less time than to wait for a thread that others keep waiting

bool finite(const uint16_t *x, int64_t count) {
  int16_t largest = 0; // of the numbers without their signs, whose order is that of these bits
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, int16_t(x[i] & 0x7fff));
  return largest < 0x7f80;
}

int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

} // namespace

bool lossless_linear_cpu(const LosslessLinear &args, int isa) {
  const Compressed &w = args.weight;
  if (!finite(args.x, args.n * w.columns)) return false;
  const LinearEngine engine = engine_for(args.n, isa);
  const int64_t stride = (args.n + engine.block - 1) / engine.block * engine.block;
  const ThreadRoom laid(1, stride * w.columns * engine.item);
  const LaidRows x = {args.x, args.n, w.columns, laid.of(0), stride};
  const std::vector<uint8_t> zeros(w.bytes[0] ? 0 : size_t(w.columns)); // a byte plane that is all 0 is not stored
  const bool many = w.rows >= 4 * kRowsAtOnce * int64_t(omp_get_max_threads()); // for every thread
  const int64_t at_once = many ? kRowsAtOnce : kFewRowsAtOnce;
  const int64_t tasks = (w.rows + at_once - 1) / at_once, groups = w.columns / kLosslessGroup;
  const int threads = w.numel * args.n <= kFewNumbers ? 1 : int(std::min<int64_t>(omp_get_max_threads(), tasks));
  const int64_t room_bytes = whole_lines(engine.room(w.columns));
  const ThreadRoom room(threads, room_bytes + stride * at_once * int64_t(sizeof(float)));
  const bool lay_together = threads > kFewThreads;
  if (!lay_together) engine.lay(x, 0, w.columns);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    uint8_t *own = room.of(omp_get_thread_num());
    float *sums = reinterpret_cast<float *>(own + room_bytes);
    engine.begin();
    if (lay_together) {
#pragma omp for schedule(static)
      for (int64_t part = 0; part < threads; ++part) { // of the columns of x
        const int64_t first = groups * part / threads, end = groups * (part + 1) / threads;
        engine.lay(x, first * kLosslessGroup, (end - first) * kLosslessGroup);
      }
    }
#pragma omp for schedule(dynamic) nowait // neighbours of a core make it slower than another one
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t first = task * at_once, count = std::min(at_once, w.rows - first);
      const CodedRows rows = {w.table,
                              w.codes + first * groups * kP7GroupBytes,
                              w.bytes[0] ? w.bytes[0] + first * w.columns : zeros.data(),
                              w.columns,
                              w.bytes[0] ? w.columns : 0,
                              int(count)};
      const NumberRange numbers = {first * w.columns, (first + count) * w.columns};
      ask_for_escapes(w, numbers);
      engine.multiply(rows, x, own, sums);
      add_escapes(w, engine, x, numbers, sums);
      engine.write(x, sums, int(count), args.bias ? args.bias + first : nullptr, args.out + first, w.rows);
    }
    engine.end();
  }
  return true;
}

} // namespace fastloss
