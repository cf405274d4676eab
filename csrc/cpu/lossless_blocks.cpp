// Decoding within blocks: whole groups straight to their place, parts of groups by way of a little room.
#include "lossless_blocks.h"
#include "p7_decode.h"

namespace fastloss {

#define FASTLOSS_LOOPS "lossless_blocks.inc"
#include "each_byte_isa.inc"
#undef FASTLOSS_LOOPS

namespace {

constexpr int64_t kChunk = 1024; // numbers whose fields stay in L1 between look-up and merge

alignas(64) constexpr uint8_t kZeros[kChunk] = {}; // a plane that is not stored

DecodeLoops decode_loops_for(int isa) {
  const ByteIsa level = byte_isa(level_for(isa));
#ifdef __x86_64__
  if (level == kAvx512Bytes) return avx512vbmi::decode_loops();
  if (level == kAvx2Bytes) return avx2::decode_loops();
#endif
  (void)level;
  return scalar::decode_loops();
}

std::vector<RansTable> tables_of(const Compressed &c) {
  std::vector<RansTable> tables;
  for (const RansPlane &plane : c.coded)
    if (plane.frequencies) tables.emplace_back(plane.frequencies);
  return tables;
}

// Section offsets are signed when they are compared: what is negative is 0.
int64_t clamped(uint64_t offset, int64_t most) { return std::min(std::max(int64_t(offset), int64_t(0)), most); }

// Always inlined: GCC drops calls of a function that does nothing but prefetch.
__attribute__((always_inline)) inline void ask(const uint8_t *from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// While a decoded block is checked and written past the cache, nothing is read that the processor's own prefetchers
// could follow: ask for the sections of the next one.
__attribute__((always_inline)) inline void ask_ahead(const Compressed &c, int64_t first, int64_t count) {
  const int64_t bit_planes = kSplits[c.number].bit_planes;
  if (first + count > c.numel) return;
  if (c.codec == kP7) ask(c.codes + first / kLosslessGroup * kP7GroupBytes, count / kLosslessGroup * kP7GroupBytes);
  for (const uint8_t *plane : c.bytes)
    if (plane) ask(plane + first, count);
  if (bit_planes) ask(c.bits + first / 8 * bit_planes, count / 8 * bit_planes);
}

} // namespace

LosslessBlocks::LosslessBlocks(const Compressed &c, int item, int isa)
    : c(c), item(item), count(lossless_blocks(c.numel)), tables(tables_of(c)), isa_(isa),
      loops_(decode_loops_for(isa)) {}

int LosslessBlocks::threads(int64_t numbers, int64_t tasks) const {
  return numbers <= kFewNumbers ? 1 : int(std::max<int64_t>(1, std::min<int64_t>(omp_get_max_threads(), tasks)));
}

CodedPieces::CodedPieces(const LosslessBlocks &blocks, int64_t first_block, int64_t count, int64_t size, uint8_t *room)
    : blocks_(blocks), first_block_(first_block), begin_(-size), size_(size), room_(room) {
  RansBlocks *next = planes_;
  for (const RansPlane &plane : blocks.c.coded)
    if (plane.frequencies) *next++ = RansBlocks(plane, first_block, count);
}

void CodedPieces::next() {
  begin_ += size_;
  // whole groups, and no more than the first block holds: the others hold no more
  const int64_t padded = std::min(size_, lossless_padded(blocks_.numbers(first_block_)) - begin_);
  for (size_t p = 0; p < blocks_.tables.size(); ++p)
    planes_[p].decode(blocks_.tables[p], padded / kRansLanes, room_ + int64_t(p) * kRansBlocks * size_, size_,
                      blocks_.isa_);
}

void LosslessBlocks::decode_groups(const CodedPieces &coded, int64_t at, int64_t from, int64_t count,
                                   uint8_t *out) const {
  const Split split = kSplits[c.number];
  const int64_t first = coded.block(at) * kLosslessBlock;
  const int64_t padded = std::min(kLosslessBlock, lossless_padded(c.numel) - first);
  alignas(64) uint8_t fields[kChunk];
  for (int64_t i = from; i < from + count; i += kChunk) {
    const int64_t some = std::min(kChunk, from + count - i);
    int64_t coded_planes = 0;
    const auto coded_bytes = [&] { return coded.bytes(coded_planes++, at) + i - coded.begin(); };
    NumberPlanes planes = {};
    if (ahead) ask_ahead(c, first + kLosslessBlock + i, some);
    if (c.codec == kP7) {
      loops_.p7_fields(c.table, c.codes + (first + i) / kLosslessGroup * kP7GroupBytes, some / kLosslessGroup, fields);
      planes.field = fields;
    } else {
      planes.field = coded_bytes();
    }
    for (int p = 0; p < split.byte_planes; ++p) {
      planes.bytes[p] = c.bytes[p] ? c.bytes[p] + first + i : kZeros;
      if (c.coded[p + 1].frequencies) planes.bytes[p] = coded_bytes();
    }
    for (int p = 0; p < split.bit_planes; ++p)
      planes.bits[p] = c.bits + first / 8 * split.bit_planes + (p * padded + i) / 8;
    loops_.merge[c.number](planes, some, out + (i - from) * item);
  }
}

void LosslessBlocks::write_escapes(int64_t block, int64_t from, int64_t to, uint8_t *out) const {
  const int64_t begin = clamped(c.escape_offsets[block], c.escapes);
  // A block has no more pairs: hostile offsets would have every block walk the whole list.
  const int64_t end = std::min(clamped(c.escape_offsets[block + 1], c.escapes), begin + kLosslessBlock / 2);
  const char *values = static_cast<const char *>(c.escape_values);
  for (int64_t e = begin; e < end; ++e) {
    const int64_t place = 2 * int64_t(c.escape_positions[e]);
    for (int64_t half = 0; half < 2; ++half)
      if (place + half >= from && place + half < to)
        memcpy(out + (place + half - from) * item, values + (2 * e + half) * item, size_t(item));
  }
}

void LosslessBlocks::decode(const CodedPieces &coded, int64_t at, int64_t from, int64_t to, uint8_t *out) const {
  const int64_t block = coded.block(at);
  if (c.codec == kRaw) {
    memcpy(out, c.raw + (block * kLosslessBlock + from) * item, size_t((to - from) * item));
    return;
  }
  alignas(64) uint8_t edge[4 * kLosslessGroup];
  for (int64_t i = from; i < to;) {
    const int64_t within = i % kLosslessGroup, whole = (to - i) / kLosslessGroup * kLosslessGroup;
    if (!within && whole) {
      decode_groups(coded, at, i, whole, out + (i - from) * item);
      i += whole;
    } else {
      const int64_t some = std::min(kLosslessGroup - within, to - i);
      decode_groups(coded, at, i - within, kLosslessGroup, edge);
      memcpy(out + (i - from) * item, edge + within * item, size_t(some * item));
      i += some;
    }
  }
  if (c.codec == kP7) write_escapes(block, from, to, out);
}

} // namespace fastloss
