// A fresh 256 MB result costs 64 Ki page faults, several times the kernel that fills it. Ask for 2 MB pages before the
// first touch: a hint without effect on contents, and harmless on memory that is already in use.
#pragma once
#include <cstddef>
#include <cstdint>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastloss {

inline void ask_for_huge_pages([[maybe_unused]] void *memory, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  constexpr size_t kWorthIt = size_t(8) << 20;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) & ~(kPage - 1);
  uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) & ~(kPage - 1);
  if (bytes >= kWorthIt && end > begin) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

} // namespace fastloss
