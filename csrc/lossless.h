// A compressed tensor as kernels see it; the names are those of python/fastloss/lossless/contract.py. docs/design.md,
// "The lossless contract", says what each section holds.
#pragma once
#include <cstdint>

namespace fastloss {

constexpr int64_t kLosslessBlock = 16384; // numbers whose escapes, stream and checksum stand alone
constexpr int64_t kLosslessGroup = 128;   // numbers whose 64 codes fill 56 bytes
constexpr int kRansLanes = 32;
constexpr int kEscapeCode = 127;

enum Codec : int { kRaw = 0, kP7 = 1, kR8 = 2 };
enum Number : int { kBf16 = 0, kFp16 = 1, kFp32 = 2, kE4m3 = 3, kE5m2 = 4, kOpaque = 5 }; // kOpaque: raw only
enum Layout : int { kLayoutRows = 0, kLayoutTiles = 1 };
enum Section : int {
  kTable = 0,
  kCodes = 1,
  kEscapeOffsets = 2,
  kEscapePositions = 3,
  kEscapeValues = 4,
  kBytes0 = 5, // byte planes 0..2 follow one another
  kBits = 8,
  kFieldFrequencies = 9, // then offsets and data; the same three of byte planes 0..2 follow
  kRawBytes = 21,
  kBlockCrc = 22,
  kSections = 23
};

// Parts of a number; bytes: of the whole number.
struct Split {
  int bytes, byte_planes, bit_planes;
};
constexpr Split kSplits[] = {{2, 1, 0}, {2, 1, 3}, {4, 3, 0}, {1, 0, 4}, {1, 0, 3}};

// One plane coded with R8; all null where it is not.
struct RansPlane {
  const uint8_t *frequencies; // [256]
  const uint64_t *offsets;    // [blocks + 1]
  const uint8_t *data;
  int64_t data_bytes;
};

struct Compressed {
  int codec, number, layout;
  int64_t numel, rows, columns;
  const uint8_t *table, *codes;
  const uint64_t *escape_offsets;
  const uint16_t *escape_positions;
  const void *escape_values;
  int64_t escapes;
  const uint8_t *bytes[3]; // null: coded, or all zero
  const uint8_t *bits, *raw;
  RansPlane coded[4]; // the field, byte planes 0..2
  const uint32_t *block_crc;
};

constexpr int64_t kPlanHead = 6; // codec, number, layout, numel, rows, columns; then offset and bytes of every section

// The sections of the blob at `base` by `plan` (kPlanHead + 2 kSections integers that contract.check_plan has passed).
inline Compressed compressed_at(const uint8_t *base, const int64_t *plan) {
  const auto at = [&](int kind) -> const uint8_t * {
    return plan[kPlanHead + 2 * kind + 1] ? base + plan[kPlanHead + 2 * kind] : nullptr;
  };
  const auto bytes = [&](int kind) { return plan[kPlanHead + 2 * kind + 1]; };
  Compressed c = {};
  c.codec = int(plan[0]), c.number = int(plan[1]), c.layout = int(plan[2]);
  c.numel = plan[3], c.rows = plan[4], c.columns = plan[5];
  c.table = at(kTable), c.codes = at(kCodes);
  c.escape_offsets = reinterpret_cast<const uint64_t *>(at(kEscapeOffsets));
  c.escape_positions = reinterpret_cast<const uint16_t *>(at(kEscapePositions));
  c.escape_values = at(kEscapeValues);
  c.escapes = bytes(kEscapePositions) / 2;
  for (int p = 0; p < 3; ++p) c.bytes[p] = at(kBytes0 + p);
  c.bits = at(kBits), c.raw = at(kRawBytes);
  for (int p = 0; p < 4; ++p) {
    const int kind = kFieldFrequencies + 3 * p;
    c.coded[p] = {at(kind), reinterpret_cast<const uint64_t *>(at(kind + 1)), at(kind + 2), bytes(kind + 2)};
  }
  c.block_crc = reinterpret_cast<const uint32_t *>(at(kBlockCrc));
  return c;
}

inline int64_t lossless_blocks(int64_t numel) { return (numel + kLosslessBlock - 1) / kLosslessBlock; }
inline int64_t lossless_padded(int64_t numel) { return (numel + kLosslessGroup - 1) / kLosslessGroup * kLosslessGroup; }

} // namespace fastloss
