// cp.async and shared memory.
#pragma once

namespace emu {
// ---- cp.async: performed at the wait (or, in a random order, sometimes at once): both are allowed on a GPU
inline void copy_now(const Copy &c) {
  memcpy(c.dst, c.src, c.size);
  memset(c.dst + c.size, 0, c.width - c.size);
}

EMU_FN void cp_async(void *dst, const void *src, unsigned size, Site s, unsigned width = 16) {
  Fiber *f = cur;
  const Copy c{static_cast<char *>(dst), static_cast<const char *>(src), size, f->group, width};
  if (reinterpret_cast<uintptr_t>(dst) % width || (size && reinterpret_cast<uintptr_t>(src) % width))
    fail("misaligned cp.async, %s:%d", s.file, s.line);
  EMU_TSAN(copy_now(c);) // a write at both ends: races with either are races
  if (g.order > 0 && rnd(2)) return copy_now(c);
  if (f->copies == kCopies) fail("emulator: more than 64 cp.async in flight in a thread, %s:%d", s.file, s.line);
  f->copy[f->copies++] = c;
}

EMU_FN void cp_async_wait(unsigned left) {
  Fiber *f = cur;
  unsigned kept = 0;
  for (unsigned i = 0; i < f->copies; ++i)
    if (f->copy[i].group + left < f->group) copy_now(f->copy[i]);
    else f->copy[kept++] = f->copy[i];
  f->copies = kept;
}

// ---- shared memory: [dynamic | static arrays, a red zone after each], one a block, filled with 0xff (NaN) at its
// start
EMU_FN void *shared_dynamic() { return cur->block->shared; }

EMU_FN void *shared_static(const void *key, size_t size) {
  unsigned i = 0;
  while (i < g.nkeys && g.keys[i].key != key) ++i;
  if (i == g.nkeys) {
    if (g.static_used + size > kStatic || i == 64) fail("more than 48 KiB of static shared memory");
    g.keys[g.nkeys++] = {key, g.smem + kRed + g.static_used + kRed * i};
    g.static_used += (size + 15) / 16 * 16;
  }
  char *p = cur->block->shared + g.keys[i].offset;
  EMU_ASAN(__asan_unpoison_memory_region(p, size);)
  return p;
}

// The same place in the shared memory of another block of the cluster.
EMU_FN void *cluster_map(const void *p, unsigned rank, Site s) {
  const size_t offset = static_cast<const char *>(p) - cur->block->shared;
  if (offset >= g.shared_size || rank >= g.cluster)
    fail("cluster_map: not shared memory, or no block %u, %s:%d", rank, s.file, s.line);
  if (!g.blocks[rank].live) fail("cluster_map: block %u of the cluster has exited, %s:%d", rank, s.file, s.line);
  return g.blocks[rank].shared + offset;
}
} // namespace emu
