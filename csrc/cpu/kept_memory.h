// Large blocks of memory that are kept for the next call. The system hands out fresh memory page by page, zeroed: for a
// gradient of 256 MB that takes several times as long as the kernel that fills it, in every training step. A block that
// comes back stays mapped, but the system may take its pages whenever it needs them (MADV_FREE).
#pragma once
#include <cstddef>

namespace fastloss {

// Blocks below this size come from malloc and go back to it.
constexpr size_t kLargeBlock = size_t(4) << 20;

void *take_memory(size_t bytes); // 64-byte aligned; std::bad_alloc where there is none
void give_memory(void *memory, size_t bytes);

// At most this many bytes are kept; a smaller limit drops blocks at once. Returns the bytes that are kept now.
size_t keep_memory(size_t limit);

} // namespace fastloss
