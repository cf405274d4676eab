// docs/design.md, "fake_quant", on the CPU: every operand is read once, every result written once, and the sums over a
// group are made in pieces that do not depend on the number of threads.
#include "fake_quant.h"
#include "cpu.h"
#include "huge_pages.h"
#include "simd_codes.h"

#include <algorithm>
#include <omp.h>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastloss {
namespace {

constexpr int64_t kPiece = 1 << 14;     // elements of a run that one task takes
constexpr int64_t kShortRun = 64;       // below it parameters are laid out over the elements
constexpr int64_t kStrip = 1024;        // elements over which they are
constexpr int64_t kParts = 64;          // tasks for the repeats of a strip
constexpr int64_t kFlush = 32;          // repeats summed in fp32
constexpr int64_t kSerial = 1 << 15;    // elements that are not worth waking a second thread
constexpr int64_t kStreamed = 16 << 20; // bytes of a result that would push everything else out of the cache

struct Total {
  double scale = 0, offset = 0;
};

// The parameters of kStrip elements, and the sums of what each of them adds to the gradients. A vector more than
// that, which may be read.
struct Strip {
  float scale[kStrip + 16], inverse[kStrip + 16], offset[kStrip + 16], low[kStrip + 16], high[kStrip + 16];
  float scale_sums[kStrip + 16] = {}, offset_sums[kStrip + 16] = {};
};

struct FakeQuantLoops {
  void (*run)(const FakeQuant &, int64_t begin, int64_t count, int64_t group, bool stream, Total &);
  void (*strip)(const FakeQuant &, int64_t begin, int64_t count, Strip &, bool stream);
};

} // namespace

#define FASTLOSS_LOOPS "fake_quant.inc"
#include "each_isa.inc"
#undef FASTLOSS_LOOPS

namespace {

FakeQuantLoops loops_for(const FakeQuant &args, int isa) {
  const int best = best_isa();
  if (isa < kBestIsa || isa > best)
    throw std::invalid_argument("isa must be -1 (best) to " + std::to_string(best) + " (" + isa_name(best) +
                                ") on this machine, got " + std::to_string(isa));
#ifdef __x86_64__
  const int level = isa == kBestIsa ? best : isa;
  if (level == kAvx512Bf16) return avx512bf16::fake_quant_loops(args);
  if (level == kAvx512) return avx512::fake_quant_loops(args);
  if (level == kAvx2) return avx2::fake_quant_loops(args);
#endif
  return scalar::fake_quant_loops(args);
}

void fence([[maybe_unused]] bool streamed) {
#ifdef __x86_64__
  if (streamed) _mm_sfence(); // before anyone reads what went past the cache
#endif
}

class Run {
public:
  Run(const FakeQuant &args, int isa) : args_(args), loops_(loops_for(args, isa)) {
    const int64_t bytes = args.n * (args.dtype == kFloat32 ? 4 : 2);
    stream_ = args.out && bytes > kStreamed;
    if (stream_) ask_for_huge_pages(args.out, size_t(bytes));
    if (args.groups == 1) args_.inner = args.n;
  }

  void run() const {
    if (!args_.n) return finish(std::vector<Total>(size_t(args_.groups)));
    args_.inner < kShortRun ? strips() : runs();
  }

private:
  FakeQuant args_;
  const FakeQuantLoops loops_;
  bool stream_;

  bool sums() const { return args_.dscale || args_.doffset; }

  int threads(int64_t tasks) const {
    return args_.n <= kSerial ? 1 : int(std::min<int64_t>(omp_get_max_threads(), tasks));
  }

  // Runs of elements that share their parameters, in pieces.
  void runs() const {
    const int64_t each = (args_.inner + kPiece - 1) / kPiece, pieces = args_.n / args_.inner * each;
    std::vector<Total> of_piece(sums() ? size_t(pieces) : 0);
    const int team = threads(pieces);
#pragma omp parallel num_threads(team) if (team > 1)
    {
#pragma omp for schedule(static)
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t run = piece / each, from = piece % each * kPiece, count = std::min(kPiece, args_.inner - from);
        Total total;
        loops_.run(args_, run * args_.inner + from, count, run % args_.groups, stream_, total);
        if (sums()) of_piece[size_t(piece)] = total;
      }
      fence(stream_);
    }
    std::vector<Total> totals(sums() ? size_t(args_.groups) : 0);
    for (size_t piece = 0; piece < of_piece.size(); ++piece) {
      Total &total = totals[piece / size_t(each) % size_t(args_.groups)];
      total.scale += of_piece[piece].scale, total.offset += of_piece[piece].offset;
    }
    finish(totals);
  }

  // Short runs: the pattern of parameters, as often as it fits into a strip or cut into strips of whole runs. A task
  // is a strip and some of the pattern's repeats.
  void strips() const {
    const int64_t pattern = args_.groups * args_.inner;
    const int64_t period = pattern <= kStrip ? kStrip / pattern * pattern : pattern;
    const int64_t width = std::min(period, kStrip / args_.inner * args_.inner), strips = (period + width - 1) / width;
    const int64_t repeats = (args_.n + period - 1) / period;
    const int64_t parts = std::min(repeats, std::max<int64_t>(1, kParts / strips));
    std::vector<Total> of_part(sums() ? size_t(parts * args_.groups) : 0);
    const int team = threads(strips * parts);
#pragma omp parallel num_threads(team) if (team > 1)
    {
#pragma omp for schedule(static)
      for (int64_t task = 0; task < strips * parts; ++task) {
        const int64_t part = task / strips, first = task % strips * width, count = std::min(width, period - first);
        Strip strip;
        lay(first, count, strip);
        Total *totals = sums() ? &of_part[size_t(part * args_.groups)] : nullptr;
        const int64_t begin = repeats * part / parts, end = repeats * (part + 1) / parts;
        for (int64_t repeat = begin; repeat < end; ++repeat) {
          const int64_t at = repeat * period + first;
          loops_.strip(args_, at, std::min(count, args_.n - at), strip, stream_);
          if (totals && (repeat + 1 == end || (repeat - begin) % kFlush == kFlush - 1))
            flush(first, count, strip, totals);
        }
      }
      fence(stream_);
    }
    std::vector<Total> totals(sums() ? size_t(args_.groups) : 0);
    for (size_t i = 0; i < of_part.size(); ++i) {
      Total &total = totals[i % size_t(args_.groups)];
      total.scale += of_part[i].scale, total.offset += of_part[i].offset;
    }
    finish(totals);
  }

  int64_t group_of(int64_t i) const { return i / args_.inner % args_.groups; }

  void lay(int64_t first, int64_t count, Strip &strip) const {
    for (int64_t i = 0; i < kStrip + 16; ++i) {
      const int64_t group = group_of(i < count ? first + i : first);
      const float zero = args_.zero_point ? args_.zero_point[group] : 0.f;
      strip.scale[i] = args_.scale[group], strip.inverse[i] = 1.f / strip.scale[i];
      strip.offset[i] = args_.offset ? args_.offset[group] : 0.f;
      strip.low[i] = args_.low - zero, strip.high[i] = args_.high - zero;
    }
  }

  void flush(int64_t first, int64_t count, Strip &strip, Total *totals) const {
    for (int64_t i = 0; i < count; ++i) {
      Total &total = totals[group_of(first + i)];
      total.scale += strip.scale_sums[i], total.offset += strip.offset_sums[i];
    }
    std::fill_n(strip.scale_sums, kStrip + 16, 0.f);
    std::fill_n(strip.offset_sums, kStrip + 16, 0.f);
  }

  void finish(const std::vector<Total> &totals) const {
    for (size_t group = 0; group < totals.size(); ++group) {
      if (args_.dscale) args_.dscale[group] = float(totals[group].scale);
      if (args_.doffset) args_.doffset[group] = float(totals[group].offset);
    }
  }
};

} // namespace

void fake_quant_cpu(const FakeQuant &args, int isa) { Run(args, isa).run(); }

} // namespace fastloss
