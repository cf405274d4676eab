// docs/design.md, "Groups of saved activations", on the CPU. A group is read for its range and again, from the cache,
// for its codes. Random bits are a function of seed and element, so codes are equal for any number of threads.
#include "quantize_groups.h"
#include "cpu.h"
#include "huge_pages.h"
#include "philox.h"
#include "simd_codes.h"

#include <algorithm>
#include <cstring>
#include <omp.h>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastloss {
namespace {

constexpr int64_t kBlock = 1024;        // codes made at a time
constexpr int64_t kPiece = 1 << 15;     // elements that one task takes; larger groups are of several tasks
constexpr int64_t kSerial = 1 << 14;    // elements that are not worth waking a second thread
constexpr int64_t kStreamed = 16 << 20; // bytes of a result that would push everything else out of the cache

struct Range {
  float low, high;
};

struct GroupLoops {
  Range (*range)(const void *x, int64_t begin, int64_t count);
  void (*encode)(const QuantizeGroups &, int64_t begin, int64_t count, float low, float step, const Noise *, uint8_t *);
  void (*pack)(const uint8_t *codes, int64_t bytes, uint8_t *to);
  void (*decode)(const DequantizeGroups &, int64_t begin, int64_t count, float low, float step, const uint8_t *codes,
                 bool stream);
  void (*spread)(const uint8_t *bytes, int64_t count, uint8_t *codes);
};

} // namespace

#define FASTLOSS_LOOPS "quantize_groups.inc"
#include "each_isa.inc"
#undef FASTLOSS_LOOPS

namespace {

GroupLoops loops_for(int dtype, int isa) {
  const int best = best_isa();
  if (isa < kBestIsa || isa > best)
    throw std::invalid_argument("isa must be -1 (best) to " + std::to_string(best) + " (" + isa_name(best) +
                                ") on this machine, got " + std::to_string(isa));
#ifdef __x86_64__
  const int level = isa == kBestIsa ? best : isa;
  if (level == kAvx512Bf16) return avx512bf16::group_loops(dtype);
  if (level == kAvx512) return avx512::group_loops(dtype);
  if (level == kAvx2) return avx2::group_loops(dtype);
#endif
  return scalar::group_loops(dtype);
}

// Calls work(group, offset in it, count, whether it is the group) for all groups, cut into pieces.
template <class Work> void for_pieces(int64_t n, int64_t group, const Work &work) {
  if (!n) return;
  const int64_t each = (group + kPiece - 1) / kPiece, pieces = (n + group - 1) / group * each;
  const int threads = n <= kSerial ? 1 : int(std::min<int64_t>(omp_get_max_threads(), pieces));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t from = piece % each * kPiece, begin = piece / each * group + from;
    work(piece / each, from, std::max<int64_t>(0, std::min({kPiece, group - from, n - begin})), each == 1);
  }
}

// The parts' ranges joined in any order are the group's.
void widen(Range &all, const Range &part) {
  if (all.low != all.low) return;
  if (!(part.low >= all.low)) all.low = part.low;
  if (!(part.high <= all.high)) all.high = part.high;
}

} // namespace

void quantize_groups_cpu(const QuantizeGroups &args, int isa) {
  const GroupLoops loops = loops_for(args.dtype, isa);
  const Noise noise = noise_of(args.seed ? uint64_t(*args.seed) : 0, 0);
  const float top = args.bits == 8 ? 255.f : 15.f;
  const auto settle = [&](int64_t group, Range range) {
    args.lows[group] = range.low, args.steps[group] = (range.high - range.low) / top;
  };
  const int64_t groups = args.n ? (args.n + args.group - 1) / args.group : 0;
  if (args.low) {
    for (int64_t g = 0; g < groups; ++g) settle(g, {args.low[g % args.channels], args.high[g % args.channels]});
  } else if (args.group > kPiece) {
    const int64_t each = (args.group + kPiece - 1) / kPiece;
    std::vector<Range> ranges(size_t(groups * each));
    for_pieces(args.n, args.group, [&](int64_t group, int64_t from, int64_t count, bool) {
      if (count) ranges[size_t(group * each + from / kPiece)] = loops.range(args.x, group * args.group + from, count);
    });
    for (int64_t g = 0; g < groups; ++g) {
      Range all = ranges[size_t(g * each)];
      const int64_t used = (std::min(args.group, args.n - g * args.group) + kPiece - 1) / kPiece;
      for (int64_t part = 1; part < used; ++part) widen(all, ranges[size_t(g * each + part)]);
      settle(g, all);
    }
  }
  for_pieces(args.n, args.group, [&](int64_t group, int64_t from, int64_t count, bool whole) {
    if (whole && !args.low) settle(group, loops.range(args.x, group * args.group, count));
    const float low = args.lows[group], step = args.steps[group];
    const int64_t padded = std::min(kPiece, args.group - from); // codes that are written, 0 beyond x's end
    uint8_t *out = args.codes + (group * args.group + from) * args.bits / 8;
    if (!(step > 0)) return void(memset(out, 0, size_t(padded * args.bits / 8)));
    for (int64_t i = 0; i < padded; i += kBlock) {
      alignas(64) uint8_t codes[kBlock + 64];
      const int64_t room = std::min(kBlock, padded - i), here = std::max<int64_t>(0, std::min(room, count - i));
      if (here) loops.encode(args, group * args.group + from + i, here, low, step, args.seed ? &noise : nullptr, codes);
      memset(codes + here, 0, size_t(room - here));
      if (args.bits == 8) memcpy(out + i, codes, size_t(room));
      else loops.pack(codes, room / 2, out + i / 2);
    }
  });
}

void dequantize_groups_cpu(const DequantizeGroups &args, int isa) {
  const GroupLoops loops = loops_for(args.dtype, isa);
  const int64_t bytes = args.n * (args.dtype == kFloat32 ? 4 : 2);
  const bool stream = bytes > kStreamed;
  if (stream) ask_for_huge_pages(args.x, size_t(bytes));
  for_pieces(args.n, args.group, [&](int64_t group, int64_t from, int64_t count, bool) {
    const float low = args.lows[group], step = args.steps[group];
    for (int64_t i = 0; i < count; i += kBlock) {
      const int64_t at = group * args.group + from + i, here = std::min(kBlock, count - i);
      uint8_t room[kBlock + 64];
      const uint8_t *codes = args.codes + at;
      if (args.bits == 4) loops.spread(args.codes + at / 2, (here + 1) / 2, room), codes = room;
      loops.decode(args, at, here, low, step, codes, stream);
    }
#ifdef __x86_64__
    if (stream) _mm_sfence(); // before anyone reads what went past the cache
#endif
  });
}

} // namespace fastloss
