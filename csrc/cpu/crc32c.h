// CRC-32C (Castagnoli: reflected polynomial 0x82f63b78, all bits set at the beginning, inverted at the end).
#pragma once
#include <cstdint>

namespace fastloss {

// The checksum by the fastest way of this machine that `isa` (as in cpu.h) allows.
class Crc32c {
public:
  explicit Crc32c(int isa);
  // `before`: the checksum of what lies before these bytes.
  uint32_t of(const uint8_t *data, int64_t bytes, uint32_t before = 0) const { return ~update_(~before, data, bytes); }
  // Of what has the checksum `first` and behind it `bytes` bytes that have `second`.
  static uint32_t joined(uint32_t first, uint32_t second, int64_t bytes);

private:
  uint32_t (*update_)(uint32_t crc, const uint8_t *data, int64_t bytes);
};

// crcs[i]: of bytes [i block, (i + 1) block) of `data`; the last block may be short. Threads share long blocks too.
void crc32c_cpu(const uint8_t *data, int64_t bytes, int64_t block, int64_t *crcs, int isa);

} // namespace fastloss
