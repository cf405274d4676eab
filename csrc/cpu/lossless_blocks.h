// Decoding within blocks, which the ops of lossless_decode.h share.
#pragma once
#include "../lossless.h"
#include "bit_blocks.h"
#include "r8_decode.h"

#include <cstdlib>
#include <memory>
#include <new>

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

// The blocks of a compressed tensor. `coded` below is the room of a thread that holds the coded planes of `tile`.
class LosslessBlocks {
public:
  LosslessBlocks(const Compressed &c, int item, int isa);

  const Compressed &c;
  const int64_t item, count; // bytes of a number; number of blocks
  bool ahead = false;        // ask memory for the next block's sections while one is decoded

  // How many blocks are taken at once, and the room that their coded planes want.
  int64_t together() const { return c.codec == kR8 ? kRansBlocks : 1; }
  int64_t room() const;
  int threads(int64_t numbers, int64_t tasks) const;

  int64_t numbers(int64_t block) const { return std::min(kLosslessBlock, c.numel - block * kLosslessBlock); }
  // The coded planes of blocks first..first+count, count <= together().
  void decode_coded(int64_t first, int64_t count, uint8_t *coded) const;
  // Numbers from..to of `block`, the `at`-th of those whose planes are in `coded`, in the order of the sequence.
  void decode(int64_t block, int64_t at, const uint8_t *coded, int64_t from, int64_t to, uint8_t *out) const;

  void stream_copy(const uint8_t *from, int64_t bytes, uint8_t *out) const { loops_.stream_copy(from, bytes, out); }

private:
  int isa_;
  DecodeLoops loops_;

  void decode_groups(int64_t block, int64_t at, const uint8_t *coded, int64_t from, int64_t count, uint8_t *out) const;
  void write_escapes(int64_t block, int64_t from, int64_t to, uint8_t *out) const;
};

} // namespace fastloss
