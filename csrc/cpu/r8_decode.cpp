// docs/design.md, "The lossless contract": R8 decoded with 32 lanes a block, the cursor clamped after each step.
#include "r8_decode.h"
#include "r8_decode_avx2.h"
#include "r8_decode_avx512.h"
#include "r8_literals.h"

#include <algorithm>
#include <cstring>

namespace fastloss {
namespace scalar {
namespace {

void decode(const RansTable &table, uint16_t *states, RansStream &stream, int64_t steps, uint8_t *out) {
  for (int64_t step = 0; step < steps; ++step, out += kRansLanes) {
    const uint8_t *cursor = stream.cursor;
    uint32_t escapes = 0;
    for (int lane = 0; lane < kRansLanes; ++lane) {
      const uint32_t x = states[lane], slot = x & 255;
      const uint32_t after = table.frequency[slot] * (x >> 8) + table.bias[slot];
      const uint32_t need = after < 256; // 0 or 1: as a branch it would be guessed wrong all the time
      out[lane] = table.symbol[slot];
      escapes |= uint32_t(int(slot) >= table.first_escape) << lane;
      states[lane] = uint16_t(after << 8 * need | (*cursor & (0 - need)));
      cursor += need;
    }
    stream.cursor = std::min(cursor, stream.end);
    if (escapes) read_literals(stream, escapes, out);
  }
}

} // namespace
} // namespace scalar

RansTable::RansTable(const uint8_t *frequencies) : symbols(0) {
  int at = 0;
  const auto deal = [&](int next, int slots) {
    std::memset(symbol + at, next, size_t(slots));
    std::memset(frequency + at, slots, size_t(slots));
    std::memset(number + at, symbols, size_t(slots));
    for (int i = 0; i < slots; ++i) bias[at + i] = uint8_t(i);
    if (symbols < kFewSymbols)
      symbol_of[symbols] = uint8_t(next), frequency_of[symbols] = uint8_t(slots), first_of[symbols] = uint8_t(at);
    at += slots, ++symbols;
  };
  for (int s = 0; s < kSlots; ++s)
    if (const int slots = std::min<int>(frequencies[s], kSlots - 1 - at)) deal(s, slots);
  first_escape = at;
  deal(0, kSlots - at);
  for (int i = symbols; i < kFewSymbols; ++i) symbol_of[i] = frequency_of[i] = first_of[i] = 0;
}

RansBlocks::RansBlocks(const RansPlane &plane, int64_t first_block, int64_t count) : count(count) {
  const auto clamped = [&](uint64_t offset) { // a negative one is 0
    return std::min(std::max<int64_t>(int64_t(offset), 0), plane.data_bytes);
  };
  for (int64_t b = 0; b < kRansBlocks; ++b) {
    const int64_t block = first_block + std::min(b, count - 1); // who wants a partner finds one
    const int64_t begin = clamped(plane.offsets[block]);
    const int64_t end = std::max(clamped(plane.offsets[block + 1]), begin);
    const uint8_t *first = plane.data + begin, *last = plane.data + end;
    std::memcpy(states[b], first, sizeof states[b]);
    streams[b] = {first, last, first + std::min<int64_t>(end - begin, int64_t(sizeof states[b])), last};
  }
}

void RansBlocks::decode(const RansTable &table, int64_t steps, uint8_t *out, int64_t stride, int isa) {
  const int level = level_for(isa);
#ifdef __x86_64__
  if (level >= kAvx512 && has_byte_look_ups()) return avx512::decode(table, *this, steps, out, stride);
  if (level >= kAvx2) return avx2::decode(table, *this, steps, out, stride);
#endif
  (void)level;
  for (int64_t b = 0; b < count; ++b) scalar::decode(table, states[b], streams[b], steps, out + b * stride);
}

} // namespace fastloss
