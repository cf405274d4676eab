#include "r8_frequencies.h"

#include <algorithm>
#include <queue>
#include <vector>

namespace fastloss {
namespace {

constexpr int kSlots = 256;
constexpr int64_t kByte = int64_t(8) << 20; // the cost of eight bits

// What one more slot saves, of the symbol `at`: first what saves most, of equals the first symbol.
struct Gain {
  int64_t saved;
  int at;
  bool operator<(const Gain &other) const { return saved != other.saved ? saved < other.saved : at > other.at; }
};

// The split of 256 slots, one or more each, of least cost, and that cost.
int64_t split_slots(const std::vector<int64_t> &counts, const int64_t *log2, std::vector<int> &slots) {
  const auto gain = [&](int at, int has) {
    return Gain{has < kSlots ? counts[size_t(at)] * (log2[has + 1] - log2[has]) : 0, at};
  };
  slots.assign(counts.size(), 1);
  std::vector<Gain> gains;
  for (size_t i = 0; i < counts.size(); ++i) gains.push_back(gain(int(i), 1));
  std::priority_queue<Gain> queue(std::less<Gain>(), std::move(gains));
  for (size_t left = kSlots - counts.size(); left-- > 0;) {
    const int at = queue.top().at;
    queue.pop();
    queue.push(gain(at, ++slots[size_t(at)]));
  }
  int64_t cost = 0;
  for (size_t i = 0; i < counts.size(); ++i) cost += counts[i] * (kByte - log2[slots[i]]);
  return cost;
}

} // namespace

void r8_frequencies(const int64_t *counts, const int64_t *log2, uint8_t *frequencies) {
  std::vector<int> order, slots;
  int64_t escaped = 0, best = -1;
  for (int s = 0; s < kSlots; ++s)
    if (counts[s] > 0) order.push_back(s), escaped += counts[s];
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return counts[a] > counts[b]; });
  std::fill(frequencies, frequencies + kSlots, uint8_t(0));
  std::vector<int64_t> kept;
  for (size_t keep = 1, worse = 0; keep <= std::min<size_t>(order.size(), kSlots - 1) && worse < 8; ++keep) {
    if (keep > 1) kept.pop_back();
    kept.push_back(counts[order[keep - 1]]);
    escaped -= kept.back();
    kept.push_back(escaped);
    const int64_t cost = split_slots(kept, log2, slots) + escaped * kByte;
    if (best >= 0 && cost >= best) {
      ++worse;
      continue;
    }
    best = cost, worse = 0;
    std::fill(frequencies, frequencies + kSlots, uint8_t(0));
    for (size_t i = 0; i < keep; ++i) frequencies[order[i]] = uint8_t(slots[i]);
  }
}

} // namespace fastloss
