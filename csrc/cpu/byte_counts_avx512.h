// Counts of up to 16 frequent bytes, 1,024 bytes at a time: each byte is looked up as one bit of 16, and bits are added
// up in columns with full adders (the carry-save tree of Harley and Seal; Mula, Kurz, Lemire, "Faster Population Counts
// Using AVX2 Instructions"). Sixteen vectors take some 60 operations, comparing them with 16 bytes 700.
#pragma once
#ifdef __x86_64__
#include "byte_look_up.h"

#include <algorithm>
#include <numeric>

namespace fastloss {
namespace {

class FrequentBytes {
public:
  int symbols() const { return symbols_; }
  // Takes the most frequent bytes of `sum` that lie near one another, or none where too many bytes would be others.
  void choose(const int64_t *sum) {
    int order[256], first = 256, last = -1;
    for (int s = 0; s < 256; ++s) order[s] = s;
    std::partial_sort(order, order + kLooked, order + 256,
                      [&](int a, int b) { return sum[a] != sum[b] ? sum[a] > sum[b] : a < b; });
    int64_t known = 0;
    symbols_ = 0;
    for (int k = 0; k < kLooked; ++k) {
      const int s = order[k];
      const int low = std::min(first, s), high = std::max(last, s);
      if (symbols_ == kFrequent || high - low >= kSpan - 1 || !sum[s]) continue;
      first = low, last = high, known += sum[s];
      symbol_[symbols_++] = uint8_t(s);
    }
    const int64_t all = std::accumulate(sum, sum + 256, int64_t(0));
    if ((all - known) * kRare > all) symbols_ = 0;
    first_ = uint8_t(first);
    memset(bit_, 0, sizeof bit_);
    for (int k = 0; k < symbols_; ++k) bit_[k / 8][symbol_[k] - first] = uint8_t(1 << k % 8);
  }

  // 1,024 bytes, others among them in a table.
  FASTLOSS_VBMI void add(const uint8_t *bytes, uint32_t *others) {
    const Tables tables = {{{_mm512_load_si512(bit_[0]), _mm512_load_si512(bit_[0] + 64)},
                            {_mm512_load_si512(bit_[1]), _mm512_load_si512(bit_[1] + 64)}},
                           _mm512_set1_epi8(char(first_)),
                           _mm512_set1_epi8(kSpan - 1)};
    __m512i columns[kLevels][2], least = _mm512_set1_epi8(-1);
    for (int level = 0; level < kLevels; ++level)
      for (int half = 0; half < 2; ++half) columns[level][half] = _mm512_load_si512(columns_[level][half]);
    const Bits sixteens = Adder<kLevels>::carry(bytes, tables, columns, least);
    for (int level = 0; level < kLevels; ++level)
      for (int half = 0; half < 2; ++half) _mm512_store_si512(columns_[level][half], columns[level][half]);
    for (int half = 0; half < 2; ++half) count(sixteens.half[half], half, 1 << kLevels);
    if (!_mm512_testn_epi8_mask(least, least)) return;
    for (int i = 0; i < 1 << kLevels; ++i, bytes += 64) {
      const Bits bits = bits_of(bytes, tables);
      const __m512i both = _mm512_or_si512(bits.half[0], bits.half[1]);
      for (uint64_t rest = _mm512_testn_epi8_mask(both, both); rest; rest &= rest - 1)
        ++others[bytes[__builtin_ctzll(rest)]];
    }
  }

  FASTLOSS_VBMI void move_to(int64_t *sum) {
    for (int level = 0; level < kLevels; ++level)
      for (int half = 0; half < 2; ++half) {
        count(_mm512_load_si512(columns_[level][half]), half, 1 << level);
        memset(columns_[level][half], 0, 64);
      }
    for (int k = 0; k < symbols_; ++k) sum[symbol_[k]] += count_[k];
    std::fill(count_, count_ + kFrequent, 0);
  }

private:
  static constexpr int kFrequent = 16, kLooked = 2 * kFrequent, kSpan = 128, kLevels = 4;
  static constexpr int64_t kRare = 64; // one byte in so many may be another, or tables are faster

  struct Bits {
    __m512i half[2];
  };
  struct Tables {
    __m512i bit[2][2], first, most;
  };

  FASTLOSS_VBMI_INLINE static Bits bits_of(const uint8_t *bytes, const Tables &tables) {
    const __m512i offset = _mm512_sub_epi8(_mm512_loadu_si512(bytes), tables.first);
    const __m512i index = _mm512_min_epu8(offset, tables.most);
    return {{_mm512_permutex2var_epi8(tables.bit[0][0], index, tables.bit[0][1]),
             _mm512_permutex2var_epi8(tables.bit[1][0], index, tables.bit[1][1])}};
  }

  // Adds 2^level vectors of bits to the columns below; what is carried out of them.
  template <int level, class = void> struct Adder {
    FASTLOSS_VBMI_INLINE static Bits carry(const uint8_t *bytes, const Tables &tables, __m512i (*columns)[2],
                                           __m512i &least) {
      const Bits a = Adder<level - 1>::carry(bytes, tables, columns, least);
      const Bits b = Adder<level - 1>::carry(bytes + (64 << (level - 1)), tables, columns, least);
      Bits carried;
      for (int half = 0; half < 2; ++half) {
        __m512i &column = columns[level - 1][half];
        carried.half[half] = _mm512_ternarylogic_epi64(column, a.half[half], b.half[half], 0xe8);
        column = _mm512_ternarylogic_epi64(column, a.half[half], b.half[half], 0x96);
      }
      return carried;
    }
  };
  template <class T> struct Adder<0, T> {
    FASTLOSS_VBMI_INLINE static Bits carry(const uint8_t *bytes, const Tables &tables, __m512i (*)[2], __m512i &least) {
      const Bits bits = bits_of(bytes, tables);
      least = _mm512_min_epu8(least, _mm512_or_si512(bits.half[0], bits.half[1]));
      return bits;
    }
  };

  FASTLOSS_VBMI_INLINE void count(__m512i bits, int half, int64_t weight) {
    for (int bit = 0; bit < 8; ++bit)
      count_[8 * half + bit] += weight * _mm_popcnt_u64(_mm512_test_epi8_mask(bits, _mm512_set1_epi8(char(1 << bit))));
  }

  alignas(64) uint8_t bit_[2][kSpan] = {}, columns_[kLevels][2][64] = {}; // columns_: bits of counts, 2^level each
  int64_t count_[kFrequent] = {};
  int symbols_ = 0;
  uint8_t symbol_[kFrequent], first_ = 0;
};

} // namespace
} // namespace fastloss
#endif
