// docs/design.md, "The lossless contract": a task is a block, or as many as a coded plane decodes side by side.
#include "lossless_decode.h"
#include "crc32c.h"
#include "huge_pages.h"
#include "lossless_blocks.h"
#include "r8_decode_bf16.h"

#include <array>
#include <atomic>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace fastloss {
namespace {

// Bytes of a result that passes the cache by: what is not in it anyway need not be read to be overwritten. Eight blocks
// at once have lines in eight places, for which ordinary stores wait longer.
constexpr int64_t kPastCache = 4 << 20, kPastCacheAtOnce = 2 << 20;
constexpr int64_t kFarAway = 16 << 20; // bytes of a result whose sections are in no cache
constexpr int64_t kTileRows = 16, kTileColumns = 128, kTile = kTileRows * kTileColumns;

int threads_for(const LosslessBlocks &blocks, int64_t numbers) {
  return blocks.threads(numbers, lossless_blocks(numbers) + 1);
}

// One unit of layout tiles, in its sequence, to its 16 rows.
template <class Pair> void write_tile(const uint8_t *tile, int64_t columns, uint8_t *out) {
  const int64_t row_bytes = columns / 2 * int64_t(sizeof(Pair));
  for (int64_t g = 0; g < 8; ++g)
    for (int64_t half = 0; half < 2; ++half) {
      uint8_t *row = out + (g + 8 * half) * row_bytes;
      for (int64_t m = 0; m < 16; ++m) // columns 8 m .. 8 m + 7 come from four lanes
        for (int64_t t = 0; t < 4; ++t)
          memcpy(row + (4 * m + t) * int64_t(sizeof(Pair)),
                 tile + ((4 * g + t) * 32 + 2 * m + half) * int64_t(sizeof(Pair)), sizeof(Pair));
    }
}

// Numbers of the sequence.
struct Range {
  int64_t first, count;
  int64_t end() const { return first + count; }
};

// body(first block, their number, thread) of each task.
template <class Body> void each_task(const LosslessBlocks &blocks, Range range, int threads, const Body &body) {
  const int64_t begin = range.first / kLosslessBlock, end = lossless_blocks(range.end()), together = blocks.together();
  const int64_t tasks = (end - begin + together - 1) / together;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t block = begin + task * together;
      body(block, std::min(together, end - block), omp_get_thread_num());
    }
#ifdef __x86_64__
    _mm_sfence(); // before anyone reads what passed the cache by
#endif
  }
}

// body(at, from, to) of each piece of `coded` that lies in the range: numbers from..to of its `at`-th block.
template <class Body> void each_piece(CodedPieces &coded, int64_t blocks, Range range, const Body &body) {
  const int64_t longest = std::min(range.end() - coded.block(0) * kLosslessBlock, kLosslessBlock);
  for (int64_t start = 0; start < longest; start += coded.size()) {
    coded.next();
    for (int64_t at = 0; at < blocks; ++at) {
      const int64_t before = coded.block(at) * kLosslessBlock; // numbers
      const int64_t from = std::max(range.first - before, start);
      const int64_t to = std::min({range.end() - before, kLosslessBlock, start + coded.size()});
      if (from < to) body(at, from, to);
    }
  }
}

// Numbers of a block that are decoded at a time. Only what leaves past the cache in whole lines gains by pieces whose
// parts lie in L1: a checksum costs more in pieces, streams of R8 are taken up again in each, and an escape of P7 is
// looked for in each piece of its block.
int64_t piece_size(const LosslessBlocks &blocks, bool lines, bool checked) {
  constexpr int64_t kFewEscapes = 64; // of a block
  const Compressed &c = blocks.c;
  if (lines && c.codec == kR8) return checked || blocks.item == 1 ? 2048 : 1024; // eight blocks are under way
  if (lines && c.codec == kP7 && c.escapes <= kFewEscapes * blocks.count) return 4096;
  return kLosslessBlock;
}

// Where decoded numbers go: large results pass the cache by. Without `out` nothing is kept.
struct Destination {
  const LosslessBlocks &blocks;
  Range range;
  uint8_t *out;
  bool large, tiles = blocks.c.layout == kLayoutTiles, stream = out && large && !tiles;
  int64_t item = blocks.item;

  uint8_t *of(int64_t block, int64_t from) const { return out + (block * kLosslessBlock + from - range.first) * item; }

  // Numbers from..to of a block that were staged.
  void take(int64_t block, int64_t from, int64_t to, const uint8_t *room) const {
    if (!out) return;
    if (!tiles) {
      if (stream) blocks.stream_copy(room, (to - from) * item, of(block, from));
      else memcpy(of(block, from), room, size_t((to - from) * item));
      return;
    }
    const int64_t place = block * kLosslessBlock + from - range.first, columns = blocks.c.columns;
    const int64_t across = columns / kTileColumns;
    for (int64_t unit = place / kTile; unit < (place + to - from) / kTile; ++unit, room += kTile * item) {
      uint8_t *corner = out + (unit / across * kTileRows * columns + unit % across * kTileColumns) * item;
      if (item == 2) write_tile<uint32_t>(room, columns, corner);
      else write_tile<uint64_t>(room, columns, corner);
    }
  }
};

// The numbers in their place; check(block, at, from, to, bytes, thread) sees them while they are hot in cache, of a
// block in their order.
template <class Check>
void decode_all(LosslessBlocks &blocks, Range range, uint8_t *out, bool checked, int isa, const Check &check) {
  if (!range.count) return;
  const Compressed &c = blocks.c;
  const bool at_once = RansBf16::takes(c, isa);
  const int64_t item = blocks.item, bytes = range.count * item;
  const Destination to_out{blocks, range, out, bytes > (at_once ? kPastCacheAtOnce : kPastCache)};
  const bool staged = to_out.tiles || to_out.stream || !out;
  const bool aligned = out && reinterpret_cast<uintptr_t>(to_out.of(0, 0)) % 64 == 0; // its lines are whole
  const int threads = threads_for(blocks, range.count);
  const int64_t size = piece_size(blocks, aligned && to_out.stream, checked);
  const int64_t stride = RansBf16::kPiece * item + 64; // of blocks at once: not all in the same set of the cache
  blocks.ahead = to_out.stream || bytes > kFarAway;
  if (bytes > kPastCache && out) ask_for_huge_pages(out, size_t(bytes));
  const ThreadRoom coded_rooms(threads, CodedPieces::room(blocks, size));
  const ThreadRoom rooms(threads, std::max(staged ? size * item : 0, at_once ? kRansBlocks * stride : 0));

  const auto eight_at_once = [&](int64_t first, int thread) {
    RansBf16 eight(c, blocks.tables[0], first);
    for (int64_t from = 0, to; from < kLosslessBlock; from = to) {
      to = from + RansBf16::kPiece;
      BlockLines cached = {rooms.of(thread), stride}, past;
      if (aligned) (to_out.stream ? past : cached) = BlockLines{to_out.of(first, from), kLosslessBlock * item};
      eight.next(past.out && !checked ? BlockLines{} : cached, past);
      for (int64_t at = 0; at < kRansBlocks; ++at) {
        check(first + at, at, from, to, cached.of(at), thread);
        if (!aligned) to_out.take(first + at, from, to, cached.of(at));
      }
    }
  };
  each_task(blocks, range, threads, [&](int64_t first, int64_t count, int thread) {
    const bool whole = first * kLosslessBlock >= range.first && (first + kRansBlocks) * kLosslessBlock <= range.end();
    if (at_once && whole) return eight_at_once(first, thread);
    CodedPieces coded(blocks, first, count, size, coded_rooms.of(thread));
    each_piece(coded, count, range, [&](int64_t at, int64_t from, int64_t to) {
      uint8_t *made = staged ? rooms.of(thread) : to_out.of(first + at, from);
      blocks.decode(coded, at, from, to, made);
      check(first + at, at, from, to, made, thread);
      if (staged) to_out.take(first + at, from, to, made);
    });
  });
}

} // namespace

void lossless_decode_cpu(const Compressed &c, int item, int64_t first, int64_t count, uint8_t *out, int isa) {
  LosslessBlocks blocks(c, item, isa);
  decode_all(blocks, {first, count}, out, false, isa, [](int64_t, int64_t, int64_t, int64_t, const uint8_t *, int) {});
}

int64_t lossless_decode_checked_cpu(const Compressed &c, int item, uint8_t *out, int isa) {
  LosslessBlocks blocks(c, item, isa);
  const Crc32c crc(isa);
  std::atomic<int64_t> bad{c.numel};
  std::vector<std::array<uint32_t, kRansBlocks>> sums(size_t(threads_for(blocks, c.numel))); // so far, of each block
  decode_all(blocks, {0, c.numel}, out, true, isa,
             [&](int64_t block, int64_t at, int64_t from, int64_t to, const uint8_t *bytes, int thread) {
               uint32_t &sum = sums[size_t(thread)][size_t(at)];
               sum = crc.of(bytes, (to - from) * item, from ? sum : 0);
               if (to < blocks.numbers(block) || sum == c.block_crc[block]) return;
               for (int64_t known = bad; block < known && !bad.compare_exchange_weak(known, block);) {
               }
             });
  return bad == c.numel ? -1 : bad.load();
}

} // namespace fastloss
