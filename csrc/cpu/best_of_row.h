// The k best columns of a row that have been seen. Candidates are collected, and when there is no room for another, all
// but the k best of them are dropped: cheaper than an order that is kept at every step.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>

namespace fastloss {

struct Candidate {
  float score;
  int32_t column;
};

// NaN first, then the higher score, then the lower column: no two candidates are equal.
inline bool better(const Candidate &a, const Candidate &b) {
  const bool a_lost = a.score != a.score, b_lost = b.score != b.score;
  if (a_lost != b_lost) return a_lost;
  if (!a_lost && a.score != b.score) return a.score > b.score;
  return a.column < b.column;
}

class BestOfRow {
public:
  bool bounded = false; // once k are known, what is not above the worst of them, nor NaN, need not be offered
  float worst = 0;

  static int64_t room_for(int64_t k) { return k + std::max<int64_t>(k, 16); }

  // k of at least 1, and memory for room_for(k).
  void begin(Candidate *memory, int64_t k) { candidates = memory, wanted = k; }

  void offer(float score, int64_t column) {
    candidates[count++] = {score, int32_t(column)};
    if (count < room_for(wanted)) return;
    std::nth_element(candidates, candidates + wanted - 1, candidates + count, better);
    count = wanted;
    const float last = candidates[wanted - 1].score;
    bounded = true;
    worst = last == last ? last : std::numeric_limits<float>::infinity();
  }

  // Sorts them, the best first, and returns how many there are, k at most. Nothing may be offered after that.
  int64_t finish() {
    std::sort(candidates, candidates + count, better);
    return std::min(count, wanted);
  }

private:
  Candidate *candidates = nullptr;
  int64_t wanted = 0, count = 0;
};

} // namespace fastloss
