// docs/design.md, "binarize": every operand is read once and every result written once, block by block through L1.
#include "binarize.h"
#include "binarize_loops.h"
#include "group_sums.h"
#include "huge_pages.h"

namespace fastloss {
namespace {

// Elements as one row where no row of bits is written or read: rows of ten numbers would be blocks of ten.
Blocks blocks_of(int64_t rows, int64_t columns, bool bits) {
  return bits || rows == 0 ? Blocks(rows, columns) : Blocks(1, rows * columns);
}

bool streamed(void *result, int64_t bytes) {
  if (!result || bytes <= kStreamed) return false;
  ask_for_huge_pages(result, size_t(bytes));
  return true;
}

void finish_stream([[maybe_unused]] bool stream) {
#ifdef __x86_64__
  if (stream) _mm_sfence(); // before anyone reads it
#endif
}

const float *beside(Laid &laid, const Parameter &p, int64_t groups, int64_t inner, const Block &b) {
  if (!p.values) return laid.room();
  if (p.count == 1) return laid.lay(p.values, 1, 0, kBlock, kBlock, b.count);
  return laid.lay(p.values, groups, b.flat / inner % groups, inner - b.flat % inner, inner, b.count);
}

// Blocks of a tensor as fp32: in place where that is possible.
struct Reader {
  const BinarizeLoops &loops;
  int dtype;
  float fill;
  alignas(64) float room[kBlock];

  const float *read(const void *data, const Block &b) {
    const char *from = element(data, dtype, b.flat);
    if (dtype == kFloat32 && b.count % loops.width == 0) return reinterpret_cast<const float *>(from);
    loops.widen[dtype](from, b.count, fill, room);
    return room;
  }
};

} // namespace

void binarize_cpu(const Binarize &args, int isa) {
  const BinarizeLoops loops = binarize_loops_for(isa);
  const Blocks blocks = blocks_of(args.rows, args.columns, args.signs || args.mask);
  const bool stream = streamed(args.y, args.rows * args.columns * bytes_of(args.dtype));
  const float limit = float(surrogate_limit(args.surrogate, args.p0, args.p1));
  const SlopeOf of = {args.p0, args.p1, args.surrogate == kReste ? ReStePower(args.p0) : ReStePower()};
  blocks.run([&](int64_t task) {
    Laid shift(0.f), scale(1.f);
    Reader x = {loops, args.dtype, std::nanf(""), {}}; // NaN: no bit beyond the end
    alignas(64) float moved[kBlock], wave[kBlock];
    uint8_t room[kRowBytes];
    blocks.each(task, [&](const Block &b) {
      const float *u = x.read(args.x, b);
      if (args.shift.values) {
        loops.subtract(u, beside(shift, args.shift, args.groups, args.inner, b), b.count, moved);
        u = moved;
      }
      if (args.mask && args.surrogate == kClip) {
        loops.mask(u, b.count, limit, args.mask + b.bits);
      } else if (args.mask) {
        loops.slope[args.surrogate](u, b.count, of, wave);
        loops.mask_of_slope(wave, b.count, args.mask + b.bits);
      }
      if (args.codes) loops.codes(u, b.count, limit, args.codes + b.flat);
      if (!args.signs && !args.y) return;
      if (args.surrogate == kBiper) {
        loops.wave_signs(u, b.count, float(args.p0), wave);
        u = wave;
      }
      uint8_t *bits = args.signs ? args.signs + b.bits : room;
      const int ones = loops.signs(u, b.count, bits);
      if (args.signs) __atomic_fetch_add(&args.popcounts[b.row], ones, __ATOMIC_RELAXED); // two tasks may share a row
      if (!args.y) return;
      loops.signed_by(bits, beside(scale, args.scale, args.groups, args.inner, b), b.count, wave);
      loops.narrow[args.dtype](wave, b.count, stream, element(args.y, args.dtype, b.flat));
    });
    finish_stream(stream);
  });
}

namespace {

class Backward {
public:
  Backward(const BinarizeBackward &args, int isa)
      : args_(args), loops_(binarize_loops_for(isa)),
        blocks_(blocks_of(args.rows, args.columns, args.signs || args.mask)),
        stream_(streamed(args.dx, args.rows * args.columns * bytes_of(args.dtype))),
        of_{args.p0, args.p1, args.surrogate == kReste ? ReStePower(args.p0) : ReStePower()} {
    if (!args.codes) return;
    const double limit = surrogate_limit(args.surrogate, args.p0, args.p1);
    for (int code = 0; code < 255; ++code) {
      const double at = std::min(limit, code * limit / 254);
      table_[code] = args.surrogate == kClip ? 1.f : float(surrogate_slope(at, args.surrogate, args.p0, args.p1));
    }
  }

  void run() {
    const size_t tasks = size_t(blocks_.tasks());
    std::vector<GroupSums> scale(args_.dscale ? tasks : 0), shift(args_.dshift ? tasks : 0);
    blocks_.run([&](int64_t task) {
      const GroupSums empty(blocks_.begin(task), blocks_.begin(task + 1), args_.groups, args_.inner);
      if (args_.dscale) scale[size_t(task)] = empty;
      if (args_.dshift) shift[size_t(task)] = empty;
      one_task(task, args_.dscale ? &scale[size_t(task)] : nullptr, args_.dshift ? &shift[size_t(task)] : nullptr);
      finish_stream(stream_);
    });
    if (args_.dscale) total_of(scale, args_.groups, 1, args_.dscale);
    if (args_.dshift) total_of(shift, args_.groups, -1, args_.dshift);
  }

private:
  const BinarizeBackward &args_;
  const BinarizeLoops loops_;
  const Blocks blocks_;
  const bool stream_;
  const SlopeOf of_;
  alignas(64) float table_[256] = {};

  void one_task(int64_t task, GroupSums *of_scale, GroupSums *of_shift) const {
    Laid shift(0.f), scale(1.f);
    Reader grad = {loops_, args_.dtype, 0.f, {}}, x = {loops_, args_.dtype, 0.f, {}};
    alignas(64) float moved[kBlock], factor[kBlock], terms[kBlock];
    uint8_t room[kRowBytes];
    // Without x only the identity is left, which does not look at u.
    const bool slopes = args_.dx || args_.dshift, from_x = args_.x && !args_.mask && !args_.codes;
    const bool signs_of_x = args_.dscale && !args_.signs;
    blocks_.each(task, [&](const Block &b) {
      const float *g = grad.read(args_.grad, b), *u = g;
      if (args_.x && ((slopes && from_x) || signs_of_x)) {
        u = x.read(args_.x, b);
        if (args_.shift.values) {
          loops_.subtract(u, beside(shift, args_.shift, args_.groups, args_.inner, b), b.count, moved);
          u = moved;
        }
      }
      if (slopes) {
        if (args_.mask) loops_.slope_of_mask(args_.mask + b.bits, b.count, factor);
        else if (args_.codes) loops_.slope_of_codes(args_.codes + b.flat, b.count, table_, factor);
        else loops_.slope[args_.surrogate](u, b.count, of_, factor);
        const float *of_y = beside(scale, args_.scale, args_.groups, args_.inner, b);
        auto give = [&](int dtype, bool stream, void *to) {
          loops_.gradient[dtype](g, of_y, factor, b.count, stream, to);
        };
        if (args_.dx) give(args_.dtype, stream_, element(args_.dx, args_.dtype, b.flat));
        if (of_shift) give(kFloat32, false, terms); // before it is rounded
        if (of_shift) of_shift->add(terms, b.flat, b.count, loops_.sum, loops_.add_terms);
      }
      if (!of_scale) return;
      const uint8_t *bits = args_.signs ? args_.signs + b.bits : room;
      if (signs_of_x) {
        if (args_.surrogate == kBiper) {
          loops_.wave_signs(u, b.count, float(args_.p0), factor);
          u = factor;
        }
        loops_.signs(u, b.count, room);
      }
      loops_.signed_by(bits, g, b.count, terms);
      of_scale->add(terms, b.flat, b.count, loops_.sum, loops_.add_terms);
    });
  }
};

} // namespace

void binarize_backward_cpu(const BinarizeBackward &args, int isa) { Backward(args, isa).run(); }

} // namespace fastloss
