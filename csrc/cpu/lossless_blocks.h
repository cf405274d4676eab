// Decoding within blocks, which the ops of lossless_decode.h share.
#pragma once
#include "../lossless.h"
#include "bit_blocks.h"
#include "r8_decode.h"

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace fastloss {

constexpr int64_t kFewNumbers = int64_t(1) << 16; // that are not worth waking a second thread

// Where the parts of some numbers lie: a field a byte, byte planes, and planes of bits.
struct NumberPlanes {
  const uint8_t *field, *bytes[3], *bits[4];
};

struct DecodeLoops {
  void (*p7_fields)(const uint8_t *table, const uint8_t *codes, int64_t groups, uint8_t *fields);
  void (*stream_copy)(const uint8_t *from, int64_t bytes, uint8_t *out);
  void (*merge[5])(const NumberPlanes &from, int64_t count, uint8_t *out); // by Number; count: whole groups
};

// 64-byte aligned room for each of some threads, made before they start so that none of them has to throw.
class ThreadRoom {
public:
  ThreadRoom(int threads, int64_t bytes)
      : bytes_((bytes + 63) / 64 * 64), memory_(bytes ? std::aligned_alloc(64, size_t(threads * bytes_)) : nullptr) {
    if (bytes && !memory_) throw std::bad_alloc();
  }
  uint8_t *of(int thread) const { return static_cast<uint8_t *>(memory_.get()) + thread * bytes_; }

private:
  struct Free {
    void operator()(void *p) const { std::free(p); }
  };
  int64_t bytes_;
  std::unique_ptr<void, Free> memory_;
};

class CodedPieces;

// The blocks of a compressed tensor.
class LosslessBlocks {
public:
  LosslessBlocks(const Compressed &c, int item, int isa);

  const Compressed &c;
  const int64_t item, count;           // bytes of a number; number of blocks
  const std::vector<RansTable> tables; // of the coded planes
  bool ahead = false;                  // ask memory for sections before their turn

  // How many blocks are taken at once.
  int64_t together() const { return c.codec == kR8 ? kRansBlocks : 1; }
  int threads(int64_t numbers, int64_t tasks) const;

  int64_t numbers(int64_t block) const { return std::min(kLosslessBlock, c.numel - block * kLosslessBlock); }
  // Numbers from..to of the `at`-th block of `coded`, within its piece, in the order of the sequence.
  void decode(const CodedPieces &coded, int64_t at, int64_t from, int64_t to, uint8_t *out) const;

  void stream_copy(const uint8_t *from, int64_t bytes, uint8_t *out) const { loops_.stream_copy(from, bytes, out); }

private:
  friend class CodedPieces;
  int isa_;
  DecodeLoops loops_;

  void decode_groups(const CodedPieces &coded, int64_t at, int64_t from, int64_t count, uint8_t *out) const;
  void write_escapes(int64_t block, int64_t from, int64_t to, uint8_t *out) const;
};

// Up to together() neighbouring blocks, of each `size` numbers at a time from the front: what these need of the coded
// planes lies in `room`.
class CodedPieces {
public:
  static int64_t room(const LosslessBlocks &blocks, int64_t size) {
    return int64_t(blocks.tables.size()) * kRansBlocks * size;
  }
  // first_block .. first_block + count; size: whole groups.
  CodedPieces(const LosslessBlocks &blocks, int64_t first_block, int64_t count, int64_t size, uint8_t *room);

  // On to the first piece, and from one to the next.
  void next();
  int64_t block(int64_t at) const { return first_block_ + at; }
  int64_t begin() const { return begin_; } // the piece's first number in every block
  int64_t size() const { return size_; }
  // The piece's bytes of coded plane `plane` (of those that there are) of the `at`-th block.
  const uint8_t *bytes(int64_t plane, int64_t at) const { return room_ + (plane * kRansBlocks + at) * size_; }

private:
  const LosslessBlocks &blocks_;
  int64_t first_block_, begin_, size_;
  uint8_t *room_;
  RansBlocks planes_[4];
};

} // namespace fastloss
