// docs/design.md, "The lossless contract": the split of numbers, a block a task.
#include "lossless_split.h"
#include "encoder_blocks.h"
#include "lossless_split_avx512.h"
#include "simd.h"

#include <stdexcept>

namespace fastloss {
// bytes_with_bit: bit `bit` of kByteLanes bytes, one bit a byte.
namespace scalar {
constexpr int kByteLanes = 8;
static inline uint8_t bytes_with_bit(const uint8_t *bytes, int bit) {
  uint64_t eight;
  memcpy(&eight, bytes, 8);
  return uint8_t((eight >> bit & 0x0101010101010101) * 0x0102040810204080 >> 56);
}
} // namespace scalar

#ifdef __x86_64__
namespace avx2 {
constexpr int kByteLanes = 32;
static inline __attribute__((target("avx2"), always_inline)) uint32_t bytes_with_bit(const uint8_t *bytes, int bit) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(bytes));
  return uint32_t(_mm256_movemask_epi8(_mm256_sll_epi16(v, _mm_cvtsi32_si128(7 - bit))));
}
} // namespace avx2

namespace avx512_common {
constexpr int kByteLanes = 64;
static inline __attribute__((target("avx512f,avx512bw"), always_inline)) uint64_t bytes_with_bit(const uint8_t *bytes,
                                                                                                 int bit) {
  return _mm512_test_epi8_mask(_mm512_loadu_si512(bytes), _mm512_set1_epi8(char(1 << bit)));
}
} // namespace avx512_common
#endif

#define FASTLOSS_WITHOUT_BF16
#define FASTLOSS_LOOPS "lossless_split.inc"
#include "each_isa.inc"
#undef FASTLOSS_LOOPS

template <bool kFieldOnly> static SplitGroups groups_for(int number, int isa) {
  if (number < kBf16 || number > kE5m2)
    throw std::invalid_argument("a number to split must be of kind 0 to 4, got " + std::to_string(number));
  const int level = level_for(isa);
#ifdef __x86_64__
  if (level >= kAvx512 && number == kBf16 && has_byte_look_ups()) return avx512vbmi::split_bf16<kFieldOnly>;
  if (level >= kAvx512) return avx512::split_groups<kFieldOnly>(number);
  if (level == kAvx2) return avx2::split_groups<kFieldOnly>(number);
#endif
  (void)level;
  return scalar::split_groups<kFieldOnly>(number);
}

SplitGroups split_groups_for(int number, int isa) { return groups_for<false>(number, isa); }
SplitGroups fields_for(int number, int isa) { return groups_for<true>(number, isa); }

void split_block(SplitGroups split, int number, const uint8_t *numbers, int64_t count, SplitParts parts) {
  const int64_t whole = count / kLosslessGroup, rest = count % kLosslessGroup, bytes = kSplits[number].bytes;
  split(numbers, whole, parts);
  if (!rest) return;
  alignas(64) uint8_t last[kLosslessGroup * sizeof(uint32_t)] = {};
  memcpy(last, numbers + whole * kLosslessGroup * bytes, size_t(rest * bytes));
  parts.field += whole * kLosslessGroup;
  for (int p = 0; p < kSplits[number].byte_planes; ++p) parts.bytes[p] += whole * kLosslessGroup;
  for (int p = 0; p < kSplits[number].bit_planes; ++p) parts.bits[p] += whole * kLosslessGroup / 8;
  split(last, 1, parts);
}

SplitParts parts_of_block(const ByteSplit &args, int64_t block, uint8_t *field) {
  const Split &split = kSplits[args.number];
  SplitParts parts = {field, {}, {}};
  for (int p = 0; p < split.byte_planes; ++p) parts.bytes[p] = args.bytes[p] + block * kLosslessBlock;
  const int64_t numbers = lossless_padded(numbers_of_block(args.numel, block));
  for (int p = 0; p < split.bit_planes; ++p)
    parts.bits[p] = args.bits + block * split.bit_planes * (kLosslessBlock / 8) + p * numbers / 8;
  return parts;
}

void byte_split_cpu(const ByteSplit &args, int isa) {
  const SplitGroups split = split_groups_for(args.number, isa);
  const uint8_t *x = static_cast<const uint8_t *>(args.x);
  each_run_of_blocks(args.numel, [&](int, int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      split_block(split, args.number, x + b * kLosslessBlock * kSplits[args.number].bytes,
                  numbers_of_block(args.numel, b), parts_of_block(args, b, args.field + b * kLosslessBlock));
  });
}

} // namespace fastloss
