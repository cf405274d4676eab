// docs/design.md, "The lossless contract": R8 encoded block by block, threads over runs of blocks.
#include "r8_encode.h"
#include "bit_blocks.h"
#include "r8_encode_avx512.h"
#include "r8_symbols.h"

#include <algorithm>
#include <cstring>

namespace fastloss {
namespace scalar {
namespace {

// x / frequency = x reciprocal >> 24, exact for x < 65536: the reciprocal is rounded up by less than frequency / 2^24.
struct Symbol {
  uint32_t reciprocal, full; // full: the state from which a byte is emitted
  uint16_t rest, start;      // rest: 256 - frequency, so that 256 (x / f) + x % f + start = x + rest (x / f) + start
};

struct Encoder {
  Symbol symbols[kEscape];
  bool escapes[kEscape];

  explicit Encoder(const RansSymbols &known) {
    for (int s = 0; s < kEscape; ++s) {
      escapes[s] = known.frequency[s] == 0;
      const int from = escapes[s] ? kEscape : s, f = known.frequency[from];
      symbols[s] = {uint32_t(((1 << 24) + f - 1) / f), uint32_t(f) << 8, uint16_t(256 - f),
                    uint16_t(known.start[from])};
    }
  }

  void encode(const uint8_t *bytes, int64_t steps, RansBlock &block) const {
    std::fill_n(block.states, kRansLanes, uint16_t(256));
    uint8_t *stream = block.stream(), *literal = block.literals;
    for (int64_t at = (steps - 1) * kRansLanes; at >= 0; at -= kRansLanes) {
      bool any = false;
      for (int lane = kRansLanes - 1; lane >= 0; --lane) {
        const uint8_t byte = bytes[at + lane];
        const Symbol &s = symbols[byte];
        any |= escapes[byte];
        uint32_t x = block.states[lane];
        const uint32_t full = x >= s.full; // 0 or 1: as a branch it would be guessed wrong all the time
        *stream = uint8_t(x);
        stream += full;
        x ^= (x ^ x >> 8) & (0 - full);
        block.states[lane] = uint16_t(x + s.rest * uint32_t(uint64_t(x) * s.reciprocal >> 24) + s.start);
      }
      for (int lane = kRansLanes - 1; any && lane >= 0; --lane)
        if (escapes[bytes[at + lane]]) *literal++ = bytes[at + lane];
    }
    block.streamed = stream - block.stream(), block.escaped = literal - block.literals;
  }

  static void append(const RansBlock &block, uint8_t *out) {
    std::reverse_copy(block.stream(), block.stream() + block.streamed, out);
  }
};

} // namespace
} // namespace scalar

namespace {

// The payloads of blocks first .. last, and their ends in `ends`, counted from the first.
template <class Encoder>
int64_t encode_run(const Encoder &encoder, const uint8_t *plane, int64_t numel, int64_t first, int64_t last,
                   uint8_t *out, int64_t *ends) {
  RansBlock block;
  alignas(64) uint8_t padded[kLosslessBlock]; // the last block, with zeros for numbers that are missing
  uint8_t *at = out;
  for (int64_t b = first; b < last; ++b) {
    const uint8_t *bytes = plane + b * kLosslessBlock;
    const int64_t numbers = std::min(kLosslessBlock, numel - b * kLosslessBlock);
    if (numbers < kLosslessBlock) {
      std::memset(padded, 0, sizeof padded);
      std::memcpy(padded, bytes, size_t(numbers));
      bytes = padded;
    }
    encoder.encode(bytes, (numbers + kRansLanes - 1) / kRansLanes, block);
    std::memcpy(at, block.states, sizeof block.states), at += sizeof block.states;
    Encoder::append(block, at), at += block.streamed;
    std::memcpy(at, block.literals, size_t(block.escaped)), at += block.escaped;
    ends[b] = at - out;
  }
  return at - out;
}

// More bytes than any payload of `numbers` has, and room to write whole vectors.
int64_t most_bytes(int64_t numbers) { return 2 * (numbers + kRansLanes) + 2 * kRansLanes; }

template <class Encoder>
RansPayloads encode_all(const RansSymbols &symbols, const uint8_t *plane, int64_t numel, int64_t *offsets) {
  constexpr int64_t kFewest = 8; // blocks that are worth a thread's start
  const Encoder encoder(symbols);
  const int64_t blocks = lossless_blocks(numel);
  const int64_t most = std::max<int64_t>(1, std::min<int64_t>(omp_get_max_threads(), blocks / kFewest));
  RansPayloads payloads;
  payloads.pieces.resize(size_t(most));
  const auto first_of = [&](int64_t piece) { return blocks * piece / most; };
  for (int64_t p = 0; p < most; ++p) {
    const int64_t run = first_of(p + 1) - first_of(p);
    payloads.pieces[p].data.reset(new uint8_t[size_t(run * most_bytes(kLosslessBlock) + 64)]);
  }
#pragma omp parallel for schedule(static) num_threads(int(most)) if (most > 1)
  for (int64_t p = 0; p < most; ++p) {
    RansPayloads::Piece &piece = payloads.pieces[p];
    piece.bytes = encode_run(encoder, plane, numel, first_of(p), first_of(p + 1), piece.data.get(), offsets + 1);
  }
  offsets[0] = 0;
  int64_t before = 0;
  for (int64_t p = 0; p < most; before += payloads.pieces[p].bytes, ++p)
    for (int64_t b = first_of(p); b < first_of(p + 1); ++b) offsets[b + 1] += before;
  return payloads;
}

} // namespace

int64_t RansPayloads::bytes() const {
  int64_t total = 0;
  for (const Piece &piece : pieces) total += piece.bytes;
  return total;
}

void RansPayloads::copy_to(uint8_t *data) const {
  for (const Piece &piece : pieces) {
    std::memcpy(data, piece.data.get(), size_t(piece.bytes));
    data += piece.bytes;
  }
}

RansPayloads r8_encode_cpu(const uint8_t *plane, const uint8_t *frequencies, int64_t numel, int64_t *offsets, int isa) {
  [[maybe_unused]] const int level = level_for(isa);
  const RansSymbols symbols = symbols_of(frequencies);
#ifdef __x86_64__
  if (level >= kAvx512 && avx512::Encoder::takes(symbols))
    return encode_all<avx512::Encoder>(symbols, plane, numel, offsets);
#endif
  return encode_all<scalar::Encoder>(symbols, plane, numel, offsets);
}

} // namespace fastloss
