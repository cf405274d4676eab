// docs/design.md, "The lossless contract": a task is a block, or as many as a coded plane decodes side by side.
#include "lossless_decode.h"
#include "crc32c.h"
#include "huge_pages.h"
#include "lossless_blocks.h"

#include <atomic>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace fastloss {
namespace {

constexpr int64_t kTileRows = 16, kTileColumns = 128, kTile = kTileRows * kTileColumns;

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

// Numbers first..first+count of the sequence by calls of body(block, at, coded, from, to, thread), `at` among those
// whose coded planes lie in `coded`.
template <class Body>
void each_block(const LosslessBlocks &blocks, const ThreadRoom &rooms, int threads, int64_t first, int64_t count,
                const Body &body) {
  const int64_t begin = first / kLosslessBlock, end = lossless_blocks(first + count), together = blocks.together();
  const int64_t tasks = (end - begin + together - 1) / together;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < tasks; ++task) {
      const int thread = omp_get_thread_num();
      const int64_t block = begin + task * together, some = std::min(together, end - block);
      uint8_t *coded = rooms.of(thread);
      blocks.decode_coded(block, some, coded);
      for (int64_t at = 0; at < some; ++at) {
        const int64_t start = (block + at) * kLosslessBlock;
        body(block + at, at, coded, std::max<int64_t>(first - start, 0),
             std::min(first + count - start, blocks.numbers(block + at)), thread);
      }
    }
#ifdef __x86_64__
    _mm_sfence(); // before anyone reads what passed the cache by
#endif
  }
}

// The same with the numbers in their place; then(block, bytes, size) sees those of each block in the order of the
// sequence while they are hot in cache. Results that would push everything else out of the cache pass it by, a whole
// block after its escapes are in. Without `out` nothing is kept.
template <class Then>
void decode_all(LosslessBlocks blocks, int64_t first, int64_t count, uint8_t *out, const Then &then) {
  if (!count) return;
  const Compressed &c = blocks.c;
  const int64_t item = blocks.item, across = c.columns / kTileColumns;
  const int threads = blocks.threads(count, lossless_blocks(count) + 1);
  const bool tiles = c.layout == kLayoutTiles, stream = out && !tiles && count * item > kStreamed;
  const bool staged = tiles || stream || !out;
  blocks.ahead = count * item > kStreamed;
  if (blocks.ahead && out) ask_for_huge_pages(out, size_t(count * item));
  const ThreadRoom coded(threads, blocks.room()), rooms(threads, staged ? kLosslessBlock * item : 0);
  each_block(blocks, coded, threads, first, count,
             [&](int64_t block, int64_t at, const uint8_t *planes, int64_t from, int64_t to, int thread) {
               const int64_t place = block * kLosslessBlock + from - first, bytes = (to - from) * item;
               uint8_t *room = staged ? rooms.of(thread) : out + place * item;
               blocks.decode(block, at, planes, from, to, room);
               then(block, room, bytes);
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
  decode_all(LosslessBlocks(c, item, isa), first, count, out, [](int64_t, const uint8_t *, int64_t) {});
}

int64_t lossless_decode_checked_cpu(const Compressed &c, int item, uint8_t *out, int isa) {
  const Crc32c crc(isa);
  std::atomic<int64_t> bad{c.numel};
  decode_all(LosslessBlocks(c, item, isa), 0, c.numel, out, [&](int64_t block, const uint8_t *bytes, int64_t size) {
    if (crc.of(bytes, size) == c.block_crc[block]) return;
    for (int64_t known = bad; block < known && !bad.compare_exchange_weak(known, block);) {
    }
  });
  return bad == c.numel ? -1 : bad.load();
}

} // namespace fastloss
