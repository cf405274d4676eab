// The best slots of k + 1 kept symbols differ little from those of k. So no split is made from nothing: the next symbol
// joins with one slot, and slots then change hands until none would gain more than it costs elsewhere. What a slot
// gains falls with each that a symbol has, so this ends at the one split that dealing out 256 slots one by one, each to
// the highest gain (of equals to the first symbol), leads to.
#include "r8_frequencies.h"

#include <algorithm>
#include <limits>

namespace fastloss {
namespace {

constexpr int kSlots = 256, kEscape = 255; // the escape's place, behind all symbols that can be kept
constexpr int kPatience = 8;               // symbols that save nothing, after which the search ends
constexpr int64_t kMostCounts = int64_t(1) << 38, kByte = int64_t(8) << 20; // a byte's bits, in 2^-20

struct Split {
  const int32_t *log2;
  int kept = 0;
  int slots[kSlots] = {};
  int64_t counts[kSlots] = {};
  int64_t gain[kSlots] = {}; // by one slot more
  int64_t loss[kSlots] = {}; // by one slot less

  Split(const int32_t *log2, int64_t total) : log2(log2) { set(kEscape, total, kSlots); }

  void set(int i, int64_t count, int f) {
    counts[i] = count, slots[i] = f;
    gain[i] = f < kSlots ? count * (log2[f + 1] - log2[f]) : -1;
    loss[i] = f > 1 ? count * (log2[f] - log2[f - 1]) : std::numeric_limits<int64_t>::max();
  }

  // Who would gain most, of equals the first.
  int best() const {
    int found = 0;
    for (int i = 1; i < kept; ++i)
      if (gain[i] > gain[found]) found = i;
    return gain[kEscape] > gain[found] ? kEscape : found;
  }

  // Who would lose least, of equals the last.
  int worst() const {
    int found = kEscape;
    for (int i = kept - 1; i >= 0; --i)
      if (loss[i] < loss[found]) found = i;
    return found;
  }

  void give(int i, int more) { set(i, counts[i], slots[i] + more); }

  // A symbol that was escaped becomes one of its own.
  void keep(int64_t count) {
    set(kept++, count, 1);
    set(kEscape, counts[kEscape] - count, slots[kEscape]);
    give(worst(), -1);
    for (;;) {
      const int to = best(), from = worst();
      if (gain[to] < loss[from] || (gain[to] == loss[from] && to >= from)) return;
      give(to, 1), give(from, -1);
    }
  }

  // An escaped byte costs its slots and eight bits.
  int64_t cost() const {
    int64_t sum = counts[kEscape] * (2 * kByte - log2[slots[kEscape]]);
    for (int i = 0; i < kept; ++i) sum += counts[i] * (kByte - log2[slots[i]]);
    return sum;
  }
};

} // namespace

bool r8_frequencies_cpu(const int64_t *counts, const int32_t *log2, uint8_t *frequencies) {
  int order[kSlots], seen = 0;
  int64_t total = 0;
  for (int s = 0; s < kSlots; ++s) {
    if (counts[s] < 0 || counts[s] >= kMostCounts) return false;
    total += counts[s];
    if (counts[s]) order[seen++] = s;
  }
  if (total >= kMostCounts) return false;
  std::stable_sort(order, order + seen, [&](int a, int b) { return counts[a] > counts[b]; });
  std::fill(frequencies, frequencies + kSlots, uint8_t(0));
  Split split(log2, total);
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int in_vain = 0; split.kept < std::min(seen, kEscape) && in_vain < kPatience; ++in_vain) {
    split.keep(counts[order[split.kept]]);
    const int64_t cost = split.cost();
    if (cost >= least) continue;
    least = cost, in_vain = -1;
    for (int i = 0; i < split.kept; ++i)
      frequencies[order[i]] = uint8_t(split.slots[i]); // of one more symbol each time
  }
  return true;
}

} // namespace fastloss
