// bgemm: the blocks of bit_products.h, each finished while it is in the cache.
#include "bgemm.h"
#include "bit_words.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace fastloss {
namespace {

constexpr float kLog2eLost = 1.92596299e-08f; // log2(e) - kLog2e

typedef void (*WriteBlock)(const Bgemm &, const BitSums &);

} // namespace

#define FASTLOSS_WITHOUT_BF16 // its instruction loses the smallest numbers
#define FASTLOSS_LOOPS "bgemm.inc"
#include "each_isa.inc"
#undef FASTLOSS_LOOPS

namespace {

WriteBlock writer_for(int output, int level) {
#ifdef __x86_64__
  if (level >= kAvx512) return avx512::writer_of(output);
  if (level == kAvx2) return avx2::writer_of(output);
#endif
  return scalar::writer_of(output);
}

struct Writer : BitConsumer {
  const Bgemm &args;
  const WriteBlock write;
  Writer(const Bgemm &args, WriteBlock write) : args(args), write(write) {}
  void take(const BitSums &block) override { write(args, block); }
};

} // namespace

void bgemm_cpu(const Bgemm &args, int isa, int engine) {
  Writer writer(args, writer_for(args.output, checked_level(isa, engine)));
  const BitProducts products = {args.a, args.b, isa, engine};
  const int threads = bit_threads(products);
  const std::vector<BitConsumer *> consumers(size_t(threads), &writer);
  multiply_bits(products, consumers.data(), threads);
  if (args.output != kBgemmSigns) return;
  const int64_t words = row_bytes(args.b.rows) / 8;
  for (int64_t i = 0; i < args.a.rows; ++i) {
    const uint8_t *row = static_cast<const uint8_t *>(args.y) + i * words * 8;
    int32_t ones = 0;
    for (int64_t w = 0; w < words; ++w) {
      uint64_t word;
      memcpy(&word, row + w * 8, sizeof word);
      ones += __builtin_popcountll(word);
    }
    args.popcounts[i] = ones;
  }
}

} // namespace fastloss
