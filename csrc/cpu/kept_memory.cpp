#include "kept_memory.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastloss {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;

struct Block {
  void *memory;
  size_t bytes;
};

// Never destroyed: tensors that hold its blocks may outlive every other static object.
struct Kept {
  std::mutex mutex;
  std::vector<Block> blocks; // the oldest first
  size_t bytes = 0, limit = size_t(1) << 30;
};

Kept &kept() {
  static Kept *instance = new Kept;
  return *instance;
}

size_t rounded(size_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

void *map(size_t bytes) {
#ifdef __linux__
  // One huge page more than asked for, so that the block can start on one.
  char *whole = static_cast<char *>(
      mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (whole == MAP_FAILED) throw std::bad_alloc();
  const size_t before = (kHugePage - reinterpret_cast<size_t>(whole) % kHugePage) % kHugePage;
  if (before) munmap(whole, before);
  munmap(whole + before + bytes, kHugePage - before);
  madvise(whole + before, bytes, MADV_HUGEPAGE);
  return whole + before;
#else
  void *memory = std::aligned_alloc(kHugePage, bytes);
  if (!memory) throw std::bad_alloc();
  return memory;
#endif
}

void unmap(const Block &block) {
#ifdef __linux__
  munmap(block.memory, block.bytes);
#else
  std::free(block.memory);
#endif
}

void drop_oldest(Kept &k) {
  unmap(k.blocks.front());
  k.bytes -= k.blocks.front().bytes;
  k.blocks.erase(k.blocks.begin());
}

} // namespace

void *take_memory(size_t bytes) {
  if (bytes < kLargeBlock) {
    void *memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
    if (!memory) throw std::bad_alloc();
    return memory;
  }
  bytes = rounded(bytes);
  Kept &k = kept();
  {
    const std::lock_guard<std::mutex> lock(k.mutex);
    for (size_t i = k.blocks.size(); i-- > 0;) { // the same size only: nothing is ever larger than what was asked for
      if (k.blocks[i].bytes != bytes) continue;
      void *memory = k.blocks[i].memory;
      k.blocks.erase(k.blocks.begin() + long(i));
      k.bytes -= bytes;
      return memory;
    }
  }
  return map(bytes);
}

void give_memory(void *memory, size_t bytes) {
  if (!memory) return;
  if (bytes < kLargeBlock) return std::free(memory);
  const Block block{memory, rounded(bytes)};
  Kept &k = kept();
  const std::lock_guard<std::mutex> lock(k.mutex);
  if (block.bytes > k.limit) return unmap(block);
  while (k.bytes + block.bytes > k.limit) drop_oldest(k);
#if defined(__linux__) && defined(MADV_FREE)
  madvise(block.memory, block.bytes, MADV_FREE);
#endif
  k.blocks.push_back(block);
  k.bytes += block.bytes;
}

size_t keep_memory(size_t limit) {
  Kept &k = kept();
  const std::lock_guard<std::mutex> lock(k.mutex);
  k.limit = limit;
  while (k.bytes > k.limit) drop_oldest(k);
  return k.bytes;
}

} // namespace fastloss
