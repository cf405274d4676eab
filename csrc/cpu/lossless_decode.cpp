// docs/design.md, "The lossless contract": a task is a block, or as many as a coded plane decodes side by side.
#include "lossless_decode.h"
#include "crc32c.h"
#include "huge_pages.h"
#include "lossless_blocks.h"

#include <array>
#include <atomic>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace fastloss {
namespace {

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

// Numbers first..first+count of the sequence by calls of body(coded, at, from, to, thread), each of whole pieces of
// `size` numbers but at the ends; those of a block in their order.
template <class Body>
void each_piece(const LosslessBlocks &blocks, int64_t size, int threads, int64_t first, int64_t count,
                const Body &body) {
  const int64_t begin = first / kLosslessBlock, end = lossless_blocks(first + count), together = blocks.together();
  const int64_t tasks = (end - begin + together - 1) / together;
  const ThreadRoom rooms(threads, CodedPieces::room(blocks, size));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < tasks; ++task) {
      const int thread = omp_get_thread_num();
      const int64_t block = begin + task * together, some = std::min(together, end - block);
      CodedPieces coded(blocks, block, some, size, rooms.of(thread));
      const int64_t longest = std::min(first + count - block * kLosslessBlock, kLosslessBlock);
      for (int64_t start = 0; start < longest; start += size) {
        coded.next();
        for (int64_t at = 0; at < some; ++at) {
          const int64_t before = (block + at) * kLosslessBlock; // numbers
          const int64_t from = std::max(first - before, start);
          const int64_t to = std::min({first + count - before, kLosslessBlock, start + size});
          if (from < to) body(coded, at, from, to, thread);
        }
      }
    }
#ifdef __x86_64__
    _mm_sfence(); // before anyone reads what passed the cache by
#endif
  }
}

// Pieces small enough that all their parts lie in L1. Of R8 eight blocks are under way; checksums and tiles want longer
// ones. An escape of P7 is looked for in each piece of its block.
int64_t piece_size(const Compressed &c, bool long_ones) {
  if (c.codec == kR8) return long_ones ? kTile : 512;
  return c.codec == kP7 ? 4096 : kLosslessBlock;
}

// The same with the numbers in their place; then(coded, at, from, to, bytes, thread) sees them while they are hot in
// cache. Results that would push everything else out of the cache pass it by. Without `out` nothing is kept.
template <class Then>
void decode_all(LosslessBlocks blocks, int64_t size, int64_t first, int64_t count, uint8_t *out, const Then &then) {
  if (!count) return;
  const Compressed &c = blocks.c;
  const int64_t item = blocks.item, across = c.columns / kTileColumns;
  const int threads = threads_for(blocks, count);
  const bool tiles = c.layout == kLayoutTiles, stream = out && !tiles && count * item > kStreamed;
  const bool staged = tiles || stream || !out;
  blocks.ahead = count * item > kStreamed;
  if (blocks.ahead && out) ask_for_huge_pages(out, size_t(count * item));
  const ThreadRoom rooms(threads, staged ? size * item : 0);
  each_piece(blocks, size, threads, first, count,
             [&](const CodedPieces &coded, int64_t at, int64_t from, int64_t to, int thread) {
               const int64_t place = coded.block(at) * kLosslessBlock + from - first, bytes = (to - from) * item;
               uint8_t *room = staged ? rooms.of(thread) : out + place * item;
               blocks.decode(coded, at, from, to, room);
               then(coded, at, from, to, room, thread);
               if (stream) blocks.stream_copy(room, bytes, out + place * item);
               if (!tiles || !out) return;
               for (int64_t unit = place / kTile; unit < (place + to - from) / kTile; ++unit, room += kTile * item) {
                 uint8_t *corner = out + (unit / across * kTileRows * c.columns + unit % across * kTileColumns) * item;
                 if (item == 2) write_tile<uint32_t>(room, c.columns, corner);
                 else write_tile<uint64_t>(room, c.columns, corner);
               }
             });
}

} // namespace

void lossless_decode_cpu(const Compressed &c, int item, int64_t first, int64_t count, uint8_t *out, int isa) {
  decode_all(LosslessBlocks(c, item, isa), piece_size(c, c.layout == kLayoutTiles), first, count, out,
             [](const CodedPieces &, int64_t, int64_t, int64_t, const uint8_t *, int) {});
}

int64_t lossless_decode_checked_cpu(const Compressed &c, int item, uint8_t *out, int isa) {
  const LosslessBlocks blocks(c, item, isa);
  const Crc32c crc(isa);
  std::atomic<int64_t> bad{c.numel};
  std::vector<std::array<uint32_t, kRansBlocks>> sums(size_t(threads_for(blocks, c.numel))); // so far, of each block
  decode_all(blocks, piece_size(c, true), 0, c.numel, out,
             [&](const CodedPieces &coded, int64_t at, int64_t from, int64_t to, const uint8_t *bytes, int thread) {
               const int64_t block = coded.block(at);
               uint32_t &sum = sums[size_t(thread)][size_t(at)];
               sum = crc.of(bytes, (to - from) * item, from ? sum : 0);
               if (to < blocks.numbers(block) || sum == c.block_crc[block]) return;
               for (int64_t known = bad; block < known && !bad.compare_exchange_weak(known, block);) {
               }
             });
  return bad == c.numel ? -1 : bad.load();
}

} // namespace fastloss
