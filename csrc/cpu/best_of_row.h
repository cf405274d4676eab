// The k best columns of a row that have been seen: a heap whose front is the worst of them, the first to go.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

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
  float worst = 0; // of the best, once there are as many as are wanted: what is not above it, or NaN, is no candidate

  bool full() const { return count == limit; }

  void begin(Candidate *memory, int64_t most) { heap = memory, limit = most; }

  void offer(float score, int64_t column) {
    const Candidate one = {score, int32_t(column)};
    if (full()) {
      if (limit == 0 || !better(one, heap[0])) return;
      std::pop_heap(heap, heap + count, better);
      heap[count - 1] = one;
    } else {
      heap[count++] = one;
    }
    std::push_heap(heap, heap + count, better);
    if (full()) worst = heap[0].score == heap[0].score ? heap[0].score : std::numeric_limits<float>::infinity();
  }

  // Sorts what there is, the best first. Nothing may be offered after that.
  const Candidate *sorted() {
    std::sort_heap(heap, heap + count, better);
    return heap;
  }
  int64_t size() const { return count; }

private:
  Candidate *heap = nullptr;
  int64_t limit = 0, count = 0;
};

} // namespace fastloss
