// Class ids are checked on the CPU before a kernel indexes with them.
#pragma once
#include <cstdint>

namespace fastloss {

// Row of the first target that is neither in [0, v) nor ignore_index, or -1.
inline int64_t first_bad_target(const int64_t *target, int64_t n, int64_t v, int64_t ignore_index) {
  for (int64_t i = 0; i < n; ++i)
    if (uint64_t(target[i]) >= uint64_t(v) && target[i] != ignore_index) return i;
  return -1;
}

} // namespace fastloss
