// Counting a byte in a table takes a load and a store, one a cycle at best. Exponents of weights have a dozen values
// that matter: those are counted 64 bytes at a time by comparing with each, and only the others in tables.
#include "byte_histogram.h"
#include "encoder_blocks.h"
#include "simd.h"

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

#ifdef __x86_64__
constexpr int kFrequent = 16;     // symbols that are counted by comparing
constexpr int64_t kVectors = 255; // whose counts fit bytes
constexpr int64_t kRare = 64;     // one byte in so many may be another, or tables are faster

#define FASTLOSS_BYTES __attribute__((target("avx512f,avx512bw")))

// The most frequent symbols of `sum`, or none where too many bytes would be others.
bool frequent(const int64_t *sum, uint8_t *symbols) {
  int order[256];
  for (int s = 0; s < 256; ++s) order[s] = s;
  std::partial_sort(order, order + kFrequent, order + 256, [&](int a, int b) { return sum[a] > sum[b]; });
  int64_t all = 0, known = 0;
  for (int s = 0; s < 256; ++s) all += sum[s];
  for (int k = 0; k < kFrequent; ++k) symbols[k] = uint8_t(order[k]), known += sum[order[k]];
  return (all - known) * kRare <= all;
}

// Up to kVectors whole vectors.
FASTLOSS_BYTES void add_vectors(const uint8_t *bytes, int64_t vectors, const uint8_t *symbols, int64_t *sum,
                                Counts &others) {
  __m512i symbol[kFrequent], count[kFrequent];
  const __m512i one = _mm512_set1_epi8(1);
  for (int k = 0; k < kFrequent; ++k) {
    symbol[k] = _mm512_set1_epi8(char(symbols[k]));
    count[k] = _mm512_setzero_si512();
  }
  for (int64_t v = 0; v < vectors; ++v) {
    const __m512i x = _mm512_loadu_si512(bytes + 64 * v);
    __mmask64 known = 0;
#pragma GCC unroll 16
    for (int k = 0; k < kFrequent; ++k) {
      const __mmask64 equal = _mm512_cmpeq_epi8_mask(x, symbol[k]);
      count[k] = _mm512_mask_add_epi8(count[k], equal, count[k], one);
      known |= equal;
    }
    for (uint64_t rest = ~uint64_t(known); rest; rest &= rest - 1)
      ++others.tables[0][bytes[64 * v + __builtin_ctzll(rest)]];
  }
  for (int k = 0; k < kFrequent; ++k)
    sum[symbols[k]] += _mm512_reduce_add_epi64(_mm512_sad_epu8(count[k], _mm512_setzero_si512()));
}
#endif

} // namespace

void byte_histogram_cpu(const uint8_t *plane, int64_t numel, int64_t *counts, int isa) {
  const int level = level_for(isa);
  std::vector<int64_t> sums(size_t(runs_of_blocks(numel)) * 256, 0);
  each_run_of_blocks(numel, [&](int run, int64_t first, int64_t last) {
    int64_t *sum = sums.data() + run * 256;
    Counts tables;
    bool vectors = false;
#ifdef __x86_64__
    uint8_t symbols[kFrequent];
#endif
    for (int64_t b = first; b < last; ++b) {
      const uint8_t *bytes = plane + b * kLosslessBlock;
      int64_t count = numbers_of_block(numel, b);
#ifdef __x86_64__
      if (vectors) {
        for (int64_t some; (some = std::min(count / 64, kVectors)) > 0; bytes += 64 * some, count -= 64 * some)
          add_vectors(bytes, some, symbols, sum, tables);
      }
#endif
      tables.add(bytes, count);
      if (b + 1 < last && (b - first) % 4096) continue; // long before a count overflows
      tables.move_to(sum);
#ifdef __x86_64__
      vectors = level >= kAvx512 && frequent(sum, symbols);
#endif
    }
  });
  for (int s = 0; s < 256; ++s) counts[s] = 0;
  for (size_t i = 0; i < sums.size(); ++i) counts[i % 256] += sums[i];
}

} // namespace fastloss
