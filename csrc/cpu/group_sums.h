// Sums over the elements of each group of a parameter, in double and in one order, whatever the number of threads. The
// group of flat element i is (i div inner) mod groups.
#pragma once
#include "bit_blocks.h"

#include <vector>

namespace fastloss {
namespace {

// The sums of one task: of the groups that its elements meet, from the one of its first element on.
class GroupSums {
public:
  using Sum = double (*)(const float *, int64_t);
  using AddTerms = void (*)(double *, const float *, int64_t);

  GroupSums() = default;
  GroupSums(int64_t begin, int64_t end, int64_t groups, int64_t inner)
      : first_(begin / inner), groups_(groups), inner_(inner),
        sums_(size_t(begin < end ? std::min(groups, (end - 1) / inner - first_ + 1) : 0)) {}

  // The terms of elements flat, flat + 1, ...
  void add(const float *terms, int64_t flat, int64_t count, Sum sum, AddTerms add_terms) {
    const int64_t met = int64_t(sums_.size());
    if (met == 1) {
      sums_[0] += sum(terms, count);
      return;
    }
    int64_t at = (flat / inner_ - first_) % met, left = inner_ - flat % inner_;
    for (int64_t i = 0; i < count; at = at + 1 == met ? 0 : at + 1) {
      if (inner_ == 1) { // neighbours go to neighbouring sums
        const int64_t some = std::min(met - at, count - i);
        add_terms(&sums_[size_t(at)], terms + i, some);
        i += some, at += some - 1;
        continue;
      }
      const int64_t some = std::min(left, count - i);
      sums_[size_t(at)] += sum(terms + i, some);
      i += some, left = inner_;
    }
  }

  void add_into(std::vector<double> &all) const {
    for (size_t i = 0; i < sums_.size(); ++i) all[size_t((first_ + int64_t(i)) % groups_)] += sums_[i];
  }

private:
  int64_t first_ = 0, groups_ = 1, inner_ = 1;
  std::vector<double> sums_;
};

inline void total_of(const std::vector<GroupSums> &tasks, int64_t groups, double factor, float *totals) {
  std::vector<double> all(static_cast<size_t>(groups));
  for (const GroupSums &task : tasks) task.add_into(all);
  for (int64_t i = 0; i < groups; ++i) totals[i] = float(factor * all[size_t(i)]);
}

} // namespace
} // namespace fastloss
