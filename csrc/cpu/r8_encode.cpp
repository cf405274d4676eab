// docs/design.md, "The lossless contract": R8 encoded block by block, threads over runs of blocks.
#include "r8_encode.h"
#include "block_planes.h"
#include "kept_memory.h"
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

class Encoder {
public:
  static constexpr int kTogether = 1; // blocks side by side

  explicit Encoder(const RansSymbols &known) {
    for (int s = 0; s < kEscape; ++s) {
      escapes_[s] = known.frequency[s] == 0;
      const int from = escapes_[s] ? kEscape : s, f = known.frequency[from];
      symbols_[s] = {uint32_t(((1 << 24) + f - 1) / f), uint32_t(f) << 8, uint16_t(256 - f),
                     uint16_t(known.start[from])};
    }
  }

  void encode(const uint8_t *const *all_bytes, int64_t steps, RansBlock *blocks, int, Ahead) const {
    const uint8_t *bytes = all_bytes[0];
    RansBlock &block = blocks[0];
    std::fill_n(block.states, kRansLanes, uint16_t(256));
    uint16_t *stream = block.stream();
    uint8_t *literal = block.literals;
    for (int64_t at = (steps - 1) * kRansLanes; at >= 0; at -= kRansLanes) {
      bool any = false;
      for (int lane = kRansLanes - 1; lane >= 0; --lane) {
        const uint8_t byte = bytes[at + lane];
        const Symbol &s = symbols_[byte];
        any |= escapes_[byte];
        uint32_t x = block.states[lane];
        const uint32_t full = x >= s.full; // 0 or 1: as a branch it would be guessed wrong all the time
        *stream = uint16_t(x);
        stream += full;
        x ^= (x ^ x >> 8) & (0 - full);
        block.states[lane] = uint16_t(x + s.rest * uint32_t(uint64_t(x) * s.reciprocal >> 24) + s.start);
      }
      for (int lane = kRansLanes - 1; any && lane >= 0; --lane)
        if (escapes_[bytes[at + lane]]) *literal++ = bytes[at + lane];
    }
    block.streamed = stream - block.stream(), block.escaped = literal - block.literals;
  }

  static void append(const RansBlock &block, uint8_t *out) {
    const uint16_t *stream = block.stream();
    for (int64_t i = block.streamed; i-- > 0;) *out++ = uint8_t(stream[i]);
  }

private:
  Symbol symbols_[kEscape];
  bool escapes_[kEscape];
};

} // namespace
} // namespace scalar

namespace {

constexpr int64_t kSlop = 64; // bytes behind a payload that whole vectors may write

// The bytes of a block, zeros for numbers that are missing: of a plane, or what is split from numbers.
struct PlaneBlocks {
  const uint8_t *plane;
  int64_t numel;

  const uint8_t *bytes(int64_t block, uint8_t *room) const {
    const int64_t count = numbers_of_block(numel, block);
    const uint8_t *own = plane + block * kLosslessBlock;
    if (count == kLosslessBlock) return own;
    std::memset(room, 0, kLosslessBlock);
    std::memcpy(room, own, size_t(count));
    return room;
  }
  Ahead ahead(int64_t, int64_t) const { return {}; }
  void written(const uint8_t *, int64_t) const {}
  void finish() const {}
};

constexpr int64_t kCalls = kLosslessBlock / (2 * kRansLanes); // of a block, two steps each

struct NumberBlocks {
  int64_t numel;
  BlockPlanes planes;

  NumberBlocks(const ByteSplit &args, int isa) : numel(args.numel), planes(args, isa) {}

  const uint8_t *bytes(int64_t block, uint8_t *room) {
    planes.split(block, room);
    planes.write(block);
    return room;
  }
  Ahead ahead(int64_t first, int64_t last) const { return planes.ahead(first, last, kCalls); }
  void written(const uint8_t *payload, int64_t bytes) {
    planes.sums.data = planes.crc().of(payload, bytes, planes.sums.data);
  }
  void finish() const { planes.finish(); }
};

// Room for the blocks that an encoder works at side by side.
template <int kTogether> struct Workplace {
  alignas(64) uint8_t rooms[kTogether][kLosslessBlock];
  RansBlock blocks[kTogether];
};

// The payloads of blocks first .. last to `out`, and their ends in `ends`, counted from the first. Returns their bytes,
// or -1 where there is no room for them.
template <class Encoder, class Source>
int64_t encode_run(const Encoder &encoder, Source &source, int64_t first, int64_t last, uint8_t *out, int64_t room,
                   int64_t *ends) {
  constexpr int kTogether = Encoder::kTogether;
  const std::unique_ptr<Workplace<kTogether>> place(new Workplace<kTogether>);
  uint8_t *at = out;
  for (int64_t b = first; b < last;) {
    const bool full = b + kTogether <= last && numbers_of_block(source.numel, b + kTogether - 1) == kLosslessBlock;
    const int some = full ? kTogether : 1;
    const uint8_t *bytes[kTogether];
    for (int i = 0; i < some; ++i) bytes[i] = source.bytes(b + i, place->rooms[i]);
    encoder.encode(bytes, (numbers_of_block(source.numel, b) + kRansLanes - 1) / kRansLanes, place->blocks, some,
                   source.ahead(b + some, std::min(b + 2 * some, last)));
    for (int i = 0; i < some; ++i) {
      const RansBlock &block = place->blocks[i];
      const uint8_t *payload = at;
      if (room - (at - out) < int64_t(sizeof block.states) + block.streamed + block.escaped + kSlop) return -1;
      std::memcpy(at, block.states, sizeof block.states), at += sizeof block.states;
      Encoder::append(block, at), at += block.streamed;
      std::memcpy(at, block.literals, size_t(block.escaped)), at += block.escaped;
      source.written(payload, at - payload);
      ends[b + i] = at - out;
    }
    b += some;
  }
  source.finish();
  return at - out;
}

// Room that any payloads of so many blocks have: a byte of the stream and a literal a number.
int64_t most_bytes(int64_t blocks) { return blocks * 2 * (kLosslessBlock + kRansLanes) + kSlop; }

RansPayloads::Piece piece_of(int64_t bytes) {
  const size_t size = size_t(bytes);
  return {{static_cast<uint8_t *>(take_memory(size)), RansPayloads::GiveBack{size}}, 0};
}

// One of these walks over blocks for each piece; the first piece lies in `data`, if that is not null, and has `room`
// bytes there: false where that was not enough.
template <class Encoder, class Source>
bool encode_pieces(const RansSymbols &symbols, std::vector<Source> &sources, int64_t *offsets, uint8_t *data,
                   int64_t room, RansPayloads &payloads) {
  const Encoder encoder(symbols);
  const int64_t blocks = lossless_blocks(sources[0].numel), most = int64_t(sources.size());
  const auto first_of = [&](int64_t piece) { return blocks * piece / most; };
  for (int64_t p = 0; p < most; ++p)
    payloads.pieces.push_back(data && !p ? RansPayloads::Piece{{nullptr, {0}}, 0}
                                         : piece_of(most_bytes(first_of(p + 1) - first_of(p))));
#pragma omp parallel for schedule(static) num_threads(int(most)) if (most > 1)
  for (int64_t p = 0; p < most; ++p) {
    RansPayloads::Piece &piece = payloads.pieces[size_t(p)];
    uint8_t *out = piece.memory ? piece.memory.get() : data;
    piece.bytes = encode_run(encoder, sources[size_t(p)], first_of(p), first_of(p + 1), out,
                             piece.memory ? int64_t(piece.memory.get_deleter().bytes) : room, offsets + 1);
  }
  offsets[0] = 0;
  int64_t before = 0;
  for (int64_t p = 0; p < most; before += payloads.pieces[size_t(p)].bytes, ++p)
    for (int64_t b = first_of(p); b < first_of(p + 1); ++b) offsets[b + 1] += before;
  return payloads.pieces[0].bytes >= 0;
}

template <class Source>
bool encode_all(const uint8_t *frequencies, std::vector<Source> &sources, int64_t *offsets, uint8_t *data, int64_t room,
                RansPayloads &payloads, int isa) {
  [[maybe_unused]] const int level = level_for(isa);
  const RansSymbols symbols = symbols_of(frequencies);
#ifdef __x86_64__
  if (level >= kAvx512 && avx512::Encoder::takes(symbols))
    return encode_pieces<avx512::Encoder>(symbols, sources, offsets, data, room, payloads);
#endif
  return encode_pieces<scalar::Encoder>(symbols, sources, offsets, data, room, payloads);
}

size_t pieces_of(int64_t numel) {
  constexpr int64_t kFewest = 8; // blocks that are worth a thread's start
  return size_t(std::max<int64_t>(1, std::min<int64_t>(omp_get_max_threads(), lossless_blocks(numel) / kFewest)));
}

} // namespace

void RansPayloads::GiveBack::operator()(uint8_t *memory) const { give_memory(memory, bytes); }

int64_t RansPayloads::bytes() const {
  int64_t total = 0;
  for (const Piece &piece : pieces) total += piece.bytes;
  return total;
}

void RansPayloads::copy_to(uint8_t *data) const {
  for (const Piece &piece : pieces) {
    if (piece.memory) std::memcpy(data, piece.memory.get(), size_t(piece.bytes)); // else it lies there
    data += piece.bytes;
  }
}

RansPayloads r8_encode_cpu(const uint8_t *plane, const uint8_t *frequencies, int64_t numel, int64_t *offsets, int isa) {
  RansPayloads payloads;
  std::vector<PlaneBlocks> sources(pieces_of(numel), PlaneBlocks{plane, numel});
  encode_all(frequencies, sources, offsets, nullptr, 0, payloads, isa);
  return payloads;
}

int64_t r8_encode_numbers_cpu(const R8Numbers &args, int isa) {
  RansPayloads payloads;
  const int64_t numel = args.split.numel, blocks = lossless_blocks(numel), most = int64_t(pieces_of(numel));
  std::vector<NumberBlocks> sources(size_t(most), NumberBlocks(args.split, isa));
  if (!encode_all(args.frequencies, sources, args.offsets, args.data, args.room, payloads, isa)) return -1;
  const int64_t bytes = payloads.bytes();
  if (bytes > args.room) return -1;
  payloads.copy_to(args.data);
  *args.sums = {};
  for (int64_t p = 0; p < most; ++p) {
    const int64_t first = blocks * p / most * kLosslessBlock, last = blocks * (p + 1) / most * kLosslessBlock;
    args.sums->append(sources[size_t(p)].planes.sums, args.split.number, lossless_padded(std::min(last, numel)) - first,
                      payloads.pieces[size_t(p)].bytes);
  }
  return bytes;
}

} // namespace fastloss
