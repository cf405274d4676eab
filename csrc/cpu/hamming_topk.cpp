// hamming_topk: the database is the left operand of bit_products.h, so that its rows are read where they lie and a
// vector of sums holds many queries; each thread keeps the best rows it has seen of every query.
#include "hamming_topk.h"
#include "bit_products.h"
#include "bit_words.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

namespace fastloss {
namespace {

// Scores as integers of the same order. NaN is the largest, as in torch.sort; -0.0 is 0.0.
uint32_t integer_order(int32_t score) { return uint32_t(score) ^ 0x80000000u; }
int32_t integer_of(uint32_t order) { return int32_t(order ^ 0x80000000u); }
uint32_t float_order(float score) {
  if (score != score) return ~0u;
  uint32_t bits;
  score += 0.f;
  memcpy(&bits, &score, sizeof bits);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
float float_of(uint32_t order) {
  if (order == ~0u) return std::numeric_limits<float>::quiet_NaN();
  const uint32_t bits = order >> 31 ? order & 0x7fffffffu : ~order;
  float score;
  memcpy(&score, &bits, sizeof score);
  return score;
}

unsigned lanes_of(int64_t count, int width) { return count >= width ? ~0u : (1u << count) - 1; }

// A candidate: its score above its row, counted from the last one, so that of equal scores the lowest row is largest.
typedef uint64_t Candidate;
constexpr uint64_t kLastRow = 0xffffffffu;
Candidate candidate_of(uint32_t order, int64_t row) { return uint64_t(order) << 32 | (kLastRow - uint64_t(row)); }

// The k best of every query among rows that one thread has seen, in rising order: candidates are collected, and when
// there is no room for another, all but the k best are dropped.
class BestOfQueries {
public:
  const float *scale;

  BestOfQueries(int64_t queries, int64_t k, const float *scale)
      : scale(scale), wanted(k), room(k + std::max<int64_t>(k, 16)), candidates(new Candidate[size_t(queries * room)]),
        counts(size_t(queries), 0),
        integers(scale ? 0 : size_t(queries + kSpare), std::numeric_limits<int32_t>::min()),     // below every sum
        floats(scale ? size_t(queries + kSpare) : 0, std::numeric_limits<float>::quiet_NaN()) {} // nothing is <= NaN

  // What is not above it, nor NaN, need not be offered.
  int32_t *worst_integers() { return integers.data(); }
  const float *worst_floats() const { return floats.data(); }

  void offer(int64_t query, uint32_t order, int64_t row) {
    Candidate *first = candidates.get() + query * room;
    int64_t &count = counts[size_t(query)];
    first[count++] = candidate_of(order, row);
    if (count < room) return;
    std::nth_element(first, first + wanted - 1, first + count, std::greater<Candidate>());
    count = wanted;
    const uint32_t last = uint32_t(first[wanted - 1] >> 32);
    if (scale) floats[size_t(query)] = last == ~0u ? std::numeric_limits<float>::infinity() : float_of(last);
    else integers[size_t(query)] = integer_of(last);
  }

  void append(int64_t query, std::vector<Candidate> &to) const {
    const Candidate *first = candidates.get() + query * room;
    to.insert(to.end(), first, first + counts[size_t(query)]);
  }

private:
  static constexpr int64_t kSpare = 16; // a vector behind the last query may be read
  const int64_t wanted, room;
  std::unique_ptr<Candidate[]> candidates; // only what is used of it costs memory
  std::vector<int64_t> counts;
  std::vector<int32_t> integers;
  std::vector<float> floats;
};

typedef void (*OfferBlock)(BestOfQueries &, const BitSums &);

} // namespace

#define FASTLOSS_WITHOUT_BF16
#define FASTLOSS_LOOPS "hamming_topk.inc"
#include "each_isa.inc"
#undef FASTLOSS_LOOPS

namespace {

OfferBlock offers_for(bool scaled, int level) {
#ifdef __x86_64__
  if (level >= kAvx512) return avx512::offers_of(scaled);
  if (level == kAvx2) return avx2::offers_of(scaled);
#endif
  return scalar::offers_of(scaled);
}

struct Search : BitConsumer {
  BestOfQueries best;
  const OfferBlock offer;
  Search(const HammingTopk &args, OfferBlock offer) : best(args.queries.rows, args.count, args.scale), offer(offer) {}
  void take(const BitSums &block) override { offer(best, block); }
};

void write_best(const HammingTopk &args, int64_t query, std::vector<Candidate> &found) {
  std::partial_sort(found.begin(), found.begin() + args.count, found.end(), std::greater<Candidate>());
  for (int64_t k = 0, at = query * args.count; k < args.count; ++k, ++at) {
    const uint32_t order = uint32_t(found[size_t(k)] >> 32);
    if (args.scale) static_cast<float *>(args.values)[at] = float_of(order);
    else static_cast<int32_t *>(args.values)[at] = integer_of(order);
    args.index[at] = int64_t(kLastRow - (found[size_t(k)] & kLastRow));
  }
}

} // namespace

void hamming_topk_cpu(const HammingTopk &args, int isa, int engine) {
  const OfferBlock offer = offers_for(args.scale != nullptr, checked_level(isa, engine));
  if (args.count == 0) return;
  const BitProducts products = {args.database, args.queries, isa, engine};
  const int threads = bit_threads(products);
  std::vector<std::unique_ptr<Search>> searches;
  std::vector<BitConsumer *> consumers;
  for (int thread = 0; thread < threads; ++thread) {
    searches.push_back(std::make_unique<Search>(args, offer));
    consumers.push_back(searches.back().get());
  }
  multiply_bits(products, consumers.data(), threads);
  std::vector<Candidate> found;
  for (int64_t query = 0; query < args.queries.rows; ++query) {
    found.clear();
    for (const std::unique_ptr<Search> &one : searches) one->best.append(query, found);
    write_best(args, query, found);
  }
}

} // namespace fastloss
