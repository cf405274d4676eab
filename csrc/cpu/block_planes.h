// The planes of one block after another, as the encoders make them: split in the first-level cache, summed up there and
// written to where they stay, past the cache where that would only be filled with what nobody reads soon.
#pragma once
#include "bit_blocks.h"
#include "crc32c.h"
#include "encoder_blocks.h"
#include "lossless_split.h"
#ifdef __x86_64__
#include "simd.h"
#endif

namespace fastloss {

// The crc32c of what one thread has written of each section.
struct SectionSums {
  uint32_t bytes[kMostBytePlanes] = {}, bits = 0, data = 0; // data: CODES of P7, DATA of R8

  // What the next thread has written: `numbers` of them (padded) and data_bytes.
  void append(const SectionSums &next, int number, int64_t numbers, int64_t data_bytes) {
    for (int p = 0; p < kMostBytePlanes; ++p) bytes[p] = Crc32c::joined(bytes[p], next.bytes[p], numbers);
    bits = Crc32c::joined(bits, next.bits, numbers / 8 * kSplits[number].bit_planes);
    data = Crc32c::joined(data, next.data, data_bytes);
  }
};

namespace {

#ifdef __x86_64__
// From and to addresses that are multiples of 64, whole cache lines.
__attribute__((target("avx512f"))) inline void copy_past_cache(uint8_t *to, const uint8_t *from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i *>(to + i), _mm512_load_si512(from + i));
}
#endif

class BlockPlanes {
public:
  SectionSums sums;

  BlockPlanes(const ByteSplit &args, int isa)
      : args_(args), split_(split_groups_for(args.number, isa)), crc_(isa), number_(kSplits[args.number]) {
    stream_ = level_for(isa) >= kAvx512 && args.numel * number_.byte_planes >= kStreamed;
  }

  const Crc32c &crc() const { return crc_; }
  const uint8_t *numbers(int64_t block) const {
    return static_cast<const uint8_t *>(args_.x) + block * kLosslessBlock * number_.bytes;
  }

  // The numbers of blocks first .. last on their way in so many calls; there may be no such blocks.
  Ahead ahead(int64_t first, int64_t last, int64_t calls) const {
    const int64_t count = std::min(last * kLosslessBlock, args_.numel) - first * kLosslessBlock;
    return count > 0 ? Ahead(numbers(first), count * number_.bytes, calls) : Ahead();
  }

  // Splits a block: the byte planes are here until `write`.
  SplitParts split(int64_t block, uint8_t *field) {
    SplitParts parts = parts_of_block(args_, block, field);
    for (int p = 0; p < number_.byte_planes; ++p) parts.bytes[p] = bytes_[p];
    const int64_t count = numbers_of_block(args_.numel, block);
    split_block(split_, args_.number, numbers(block), count, parts);
    if (args_.block_crc) args_.block_crc[block] = crc_.of(numbers(block), count * number_.bytes);
    return parts;
  }

  void write(int64_t block) {
    const int64_t padded = lossless_padded(numbers_of_block(args_.numel, block));
    for (int p = 0; p < number_.byte_planes; ++p)
      write(bytes_[p], padded, args_.bytes[p] + block * kLosslessBlock, sums.bytes[p]);
    if (number_.bit_planes)
      sums.bits = crc_.of(args_.bits + block * number_.bit_planes * (kLosslessBlock / 8),
                          padded / 8 * number_.bit_planes, sums.bits);
  }

  // Any section's next bytes, from an address that is a multiple of 64.
  void write(const uint8_t *from, int64_t bytes, uint8_t *to, uint32_t &sum) const {
    sum = crc_.of(from, bytes, sum);
#ifdef __x86_64__
    if (stream_ && bytes % 64 == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0)
      return copy_past_cache(to, from, bytes);
#endif
    memcpy(to, from, size_t(bytes));
  }

  // After the last block of a thread.
  void finish() const {
#ifdef __x86_64__
    if (stream_) _mm_sfence(); // before anyone reads what went past the cache
#endif
  }

private:
  ByteSplit args_;
  SplitGroups split_;
  Crc32c crc_;
  Split number_;
  bool stream_;
  alignas(64) uint8_t bytes_[kMostBytePlanes][kLosslessBlock];
};

} // namespace
} // namespace fastloss
