// docs/design.md, "The bit contract": packing and unpacking, each number read once and written once.
#include "pack_bits.h"
#include "bit_blocks.h"
#include "huge_pages.h"
#include "simd_lanes.h"

namespace fastloss {
namespace {

// What a block is packed from, all fp32 and readable up to a whole vector.
struct PackLine {
  const float *x, *center, *scale;
  int low, planes;
};

struct UnpackLine {
  const uint8_t *bits[kMostPlanes];
  const int *weights;
  int offset, planes;
  const float *scale;
};

struct PackLoops {
  void (*pack[3])(const PackLine &, int64_t count, uint8_t *const *bits, int *ones); // by PackKind
  void (*unpack)(const UnpackLine &, int64_t count, float *values);
  void (*widen[3])(const void *, int64_t, float, float *); // by DType
  void (*narrow[3])(const float *, int64_t, bool, void *);
  int64_t width;
};

} // namespace

#define FASTLOSS_LOOPS "pack_bits.inc"
#include "each_isa.inc"
#undef FASTLOSS_LOOPS

namespace {

PackLoops pack_loops_for(int isa) {
  const int level = level_for(isa);
#ifdef __x86_64__
  if (level == kAvx512Bf16) return avx512bf16::pack_loops();
  if (level == kAvx512) return avx512::pack_loops();
  if (level == kAvx2) return avx2::pack_loops();
#endif
  (void)level;
  return scalar::pack_loops();
}

// The numbers of [rows or 1][groups] beside a block.
const float *by_group(Laid &laid, const float *values, int64_t rows, int64_t columns, int64_t group, const Block &b) {
  if (!values) return laid.room();
  const int64_t size = group ? group : columns, groups = group ? (columns + group - 1) / group : 1;
  const float *row = values + (rows == 1 ? 0 : b.row * groups);
  return laid.lay(row, groups, b.column / size, size - b.column % size, size, b.count);
}

} // namespace

void pack_bits_cpu(const PackBits &args, int isa) {
  const PackLoops loops = pack_loops_for(isa);
  const Blocks blocks(args.rows, args.columns);
  const int64_t plane = args.rows * row_bytes(args.columns);
  blocks.run([&](int64_t task) {
    Laid center(0.f), scale(1.f);
    alignas(64) float room[kBlock];
    blocks.each(task, [&](const Block &b) {
      PackLine line = {nullptr, nullptr, nullptr, args.low, args.planes};
      line.x = reinterpret_cast<const float *>(element(args.x, args.dtype, b.flat));
      if (args.dtype != kFloat32 || b.count % loops.width) { // NaN: no bit beyond the end
        loops.widen[args.dtype](line.x, b.count, std::nanf(""), room);
        line.x = room;
      }
      line.center = by_group(center, args.center, args.center_rows, args.columns, args.group, b);
      line.scale = by_group(scale, args.scale, args.scale_rows, args.columns, args.group, b);
      uint8_t *bits[kMostPlanes] = {};
      int ones[kMostPlanes];
      for (int p = 0; p < args.planes; ++p) bits[p] = args.bits + p * plane + b.bits;
      loops.pack[args.kind](line, b.count, bits, ones);
      for (int p = 0; p < args.planes; ++p) // a row may be shared by two tasks
        __atomic_fetch_add(&args.popcounts[p * args.rows + b.row], ones[p], __ATOMIC_RELAXED);
    });
  });
}

void unpack_bits_cpu(const UnpackBits &args, int isa) {
  const PackLoops loops = pack_loops_for(isa);
  const Planes &planes = args.planes;
  const Blocks blocks(planes.rows, planes.columns);
  const int64_t plane = planes.rows * row_bytes(planes.columns);
  const int64_t bytes = planes.rows * planes.columns * bytes_of(args.dtype);
  const bool stream = bytes > kStreamed;
  if (stream) ask_for_huge_pages(args.x, size_t(bytes));
  blocks.run([&](int64_t task) {
    Laid scale(1.f);
    alignas(64) float room[kBlock];
    blocks.each(task, [&](const Block &b) {
      UnpackLine line = {{}, planes.weights, planes.offset, planes.count, nullptr};
      for (int p = 0; p < planes.count; ++p) line.bits[p] = planes.bits + p * plane + b.bits;
      line.scale = by_group(scale, args.scale, args.scale_rows, planes.columns, args.group, b);
      loops.unpack(line, b.count, room);
      loops.narrow[args.dtype](room, b.count, stream, element(args.x, args.dtype, b.flat));
    });
#ifdef __x86_64__
    if (stream) _mm_sfence(); // before anyone reads them
#endif
  });
}

} // namespace fastloss
