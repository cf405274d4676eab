// Counting a byte in a table takes a load and a store, one a cycle at best. Exponents of weights have a dozen values
// that matter: those are counted 64 bytes at a time (byte_counts_avx512.h), and only the others in tables.
#include "byte_histogram.h"
#include "byte_counts_avx512.h"
#include "encoder_blocks.h"
#include "lossless_split.h"

#include <algorithm>
#include <vector>

namespace fastloss {
namespace {

// Several tables: equal bytes in a row would wait for one another's counts.
constexpr int kTables = 8;

struct Counts {
  uint32_t tables[kTables][256] = {};

  void add(const uint8_t *bytes, int64_t count) {
    int64_t i = 0;
    for (; i + kTables <= count; i += kTables) {
      uint64_t eight;
      memcpy(&eight, bytes + i, 8);
      for (int t = 0; t < kTables; ++t) ++tables[t][uint8_t(eight >> 8 * t)];
    }
    for (; i < count; ++i) ++tables[0][bytes[i]];
  }

  void move_to(int64_t *sum) {
    for (auto &table : tables)
      for (int s = 0; s < 256; ++s) sum[s] += table[s], table[s] = 0;
  }
};

// The counts of one thread.
class Histogram {
public:
  explicit Histogram(int isa) : level_(level_for(isa)) {}

  // Up to kLosslessBlock bytes, piece by piece as of(at, count) makes them.
  template <class Pieces> void add_block(int64_t count, const Pieces &of) {
    int64_t at = 0;
#ifdef __x86_64__
    if (frequent_.symbols())
      for (; at + kPiece <= count; at += kPiece) frequent_.add(of(at, kPiece), tables_.tables[0]);
#endif
    for (int64_t some; at < count; at += some) {
      some = std::min(count - at, kPiece);
      tables_.add(of(at, some), some);
    }
    if (++blocks_ < next_) return;           // of more blocks the frequent bytes are better known
    next_ += std::min<int64_t>(next_, 4096); // long before a count overflows
    settle();
#ifdef __x86_64__
    if (level_ >= kAvx512 && has_byte_look_ups()) frequent_.choose(sums_);
#endif
  }

  const int64_t *settle() {
    tables_.move_to(sums_);
#ifdef __x86_64__
    frequent_.move_to(sums_);
#endif
    return sums_;
  }

private:
  int level_;
  int64_t blocks_ = 0, next_ = 1, sums_[256] = {};
  Counts tables_;
#ifdef __x86_64__
  FrequentBytes frequent_;
#endif
};

// add(histogram, block) of every block.
template <class Add> void count_blocks(int64_t numel, int64_t *counts, int isa, const Add &add) {
  std::fill(counts, counts + 256, 0);
  each_run_of_blocks(numel, [&](int, int64_t first, int64_t last) {
    Histogram histogram(isa);
    for (int64_t b = first; b < last; ++b) add(histogram, b);
    const int64_t *sums = histogram.settle();
#pragma omp critical(fastloss_byte_histogram)
    for (int s = 0; s < 256; ++s) counts[s] += sums[s];
  });
}

} // namespace

void byte_histogram_cpu(const uint8_t *plane, int64_t numel, int64_t *counts, int isa) {
  count_blocks(numel, counts, isa, [&](Histogram &histogram, int64_t block) {
    histogram.add_block(numbers_of_block(numel, block),
                        [&](int64_t at, int64_t) { return plane + block * kLosslessBlock + at; });
  });
}

void field_histogram_cpu(const void *x, int number, int64_t numel, int64_t *counts, int isa) {
  const SplitGroups split = fields_for(number, isa);
  const int64_t bytes = kSplits[number].bytes;
  count_blocks(numel, counts, isa, [&](Histogram &histogram, int64_t block) {
    const uint8_t *numbers = static_cast<const uint8_t *>(x) + block * kLosslessBlock * bytes;
    alignas(64) uint8_t fields[kPiece];
    histogram.add_block(numbers_of_block(numel, block), [&](int64_t at, int64_t count) {
      prefetch(numbers + at * bytes + kAhead, count * bytes);
      split_block(split, number, numbers + at * bytes, count, {fields, {}, {}});
      return fields;
    });
  });
}

void sample_planes_cpu(const void *x, int number, int64_t blocks, int64_t apart, int64_t *counts, int isa) {
  const SplitGroups split = split_groups_for(number, isa);
  const Split &parts_of = kSplits[number];
  std::fill(counts, counts + parts_of.byte_planes * 256, 0);
  each_run_of_blocks(blocks * kLosslessBlock, [&](int, int64_t first, int64_t last) {
    Counts tables[kMostBytePlanes];
    alignas(64) uint8_t field[kPiece], bytes[kMostBytePlanes][kPiece], bits[kMostBitPlanes][kPiece / 8];
    const SplitParts parts = {field, {bytes[0], bytes[1], bytes[2]}, {bits[0], bits[1], bits[2], bits[3]}};
    for (int64_t at = first * kLosslessBlock; at < last * kLosslessBlock; at += kPiece) {
      const int64_t from = at / kLosslessBlock * apart * kLosslessBlock + at % kLosslessBlock;
      split_block(split, number, static_cast<const uint8_t *>(x) + from * parts_of.bytes, kPiece, parts);
      for (int p = 0; p < parts_of.byte_planes; ++p) tables[p].add(bytes[p], kPiece);
    }
#pragma omp critical(fastloss_byte_histogram)
    for (int p = 0; p < parts_of.byte_planes; ++p) tables[p].move_to(counts + 256 * p);
  });
}

} // namespace fastloss
