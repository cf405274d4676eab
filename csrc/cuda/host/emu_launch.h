// A launch: the threads of one cluster after the other.
#pragma once

namespace emu {
// The life of one CUDA thread.
EMU_FN void entry() {
  EMU_ASAN(const void *bottom; size_t size; __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
           if (g.from == &g.main) {
             g.main.stack = (char *)bottom;
             g.main.tid.x = unsigned(size >> 12);
           })
  g.call(g.ctx);
  Fiber *f = cur;
  Block &k = *f->block;
  Warp &w = *f->warp;
  f->done = true;
  w.done |= 1u << f->lane;
  EMU_TSAN(__tsan_release(&g.end_tag); __tsan_release(&k.end_tag);)
  if (!--k.live) { // its shared memory is gone: a neighbour in the cluster that still reads it gets NaN, or a report
    EMU_TSAN(__tsan_acquire(&k.end_tag); __tsan_acquire(&g.cluster_bar.read_tag);)
    EMU_ASAN(__asan_unpoison_memory_region(k.shared, g.shared_size);)
    memset(k.shared, 0xff, g.shared_size);
    EMU_ASAN(__asan_poison_memory_region(k.shared, g.shared_size);)
  }
  if (g.exited_ok) {
    if (k.live && k.bar[0].arrived == k.live) complete(k.bar[0], k.fibers, g.threads);
    if (g.cluster_bar.arrived && g.cluster_bar.arrived == cluster_need()) complete(g.cluster_bar, g.fibers, g.nfibers);
    for (unsigned i = 0; i < 32; ++i)
      if (w.waiting >> i & 1) try_finish(w, w.mask[i], reinterpret_cast<Finish>(const_cast<void *>(w.lane[i]->wait)));
  }
  switch_to(pick(), true);
}

// Who waits where.
inline std::string stuck() {
  std::vector<std::pair<std::string, unsigned>> at;
  unsigned exited = 0;
  char t[256];
  for (unsigned i = 0; i < g.nfibers; ++i) {
    const Fiber &f = g.fibers[i];
    if (f.done) {
      ++exited;
      continue;
    }
    snprintf(t, sizeof t, "%s (%s:%d)", f.at.what, f.at.file, f.at.line);
    auto it = std::find_if(at.begin(), at.end(), [&](auto &a) { return a.first == t; });
    if (it == at.end()) at.push_back({t, 1});
    else ++it->second;
  }
  std::string s = "deadlock in the cluster of block " + std::to_string(g.blocks[0].idx.x) + ": ";
  for (auto &a : at) s += std::to_string(a.second) + " threads wait at " + a.first + ", ";
  return s + std::to_string(exited) + " exited";
}

// Zero pages, kept between clusters and launches (not under tsan: reuse would look like a race between two blocks).
template <class T> T *fresh(T *&p, size_t &have, size_t want) {
  EMU_TSAN(if (have) munmap(p, have); have = 0;)
  if (have < want) {
    EMU_ASAN(if (have) __asan_unpoison_memory_region(p, have);) // marks outlive a mapping
    if (have) munmap(static_cast<void *>(p), have);
    void *m = mmap(nullptr, want, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m == MAP_FAILED) throw std::runtime_error("emulator: out of memory");
    p = static_cast<T *>(m);
    have = want;
  }
  return p;
}

#ifdef __SANITIZE_THREAD__
// Not at once: tsan gives the identity of a dead thread to a new one, and sees no race between them.
inline void retire(void *fiber, size_t keep) {
  static std::vector<void *> dead;
  static size_t next;
  if (fiber) dead.push_back(fiber);
  while (dead.size() - next > keep) __tsan_destroy_fiber(dead[next++]);
}
#endif

EMU_FN uint3 index_in(const dim3 &extent, unsigned n) {
  return {n % extent.x, n / extent.x % extent.y, n / extent.x / extent.y};
}

EMU_FN void run_cluster(unsigned first) {
  static char *stacks, *shared;
  static Fiber *fibers;
  static Warp *warps;
  static Block *blocks;
  static size_t have[5];
  fresh(stacks, have[0], g.nfibers * kStack);
  fresh(shared, have[1], g.cluster * g.shared_size);
  g.fibers = fresh(fibers, have[2], g.nfibers * sizeof(Fiber));
  g.warp = fresh(warps, have[3], g.nwarps * sizeof(Warp));
  g.blocks = fresh(blocks, have[4], g.cluster * sizeof(Block));
  g.cluster_bar = {};
  g.warp_now = nullptr;
  EMU_ASAN(__asan_unpoison_memory_region(stacks, g.nfibers * kStack);
           __asan_unpoison_memory_region(shared, g.cluster * g.shared_size);)
  memset(shared, 0xff, g.cluster * g.shared_size);
  for (unsigned b = 0, i = 0; b < g.cluster; ++b) {
    Block &k = g.blocks[b];
    k = {};
    k.idx = index_in(g.grid_dim, first + b);
    k.rank = b;
    k.live = g.threads;
    k.fibers = g.fibers + i;
    k.shared = shared + b * g.shared_size;
    EMU_ASAN(__asan_poison_memory_region(k.shared + g.dynamic, g.shared_size - g.dynamic);)
    for (unsigned t = 0; t < g.threads; ++t, ++i) {
      Fiber &f = g.fibers[i];
      Warp &w = g.warp[b * g.warps + t / 32];
      if (t % 32 == 0) {
        w = {};
        w.done = ~0u;
      }
      void *sp = f.sp;
      f = {};
      f.sp = sp;
      f.block = &k;
      f.warp = &w;
      f.lane = t % 32;
      f.rank = t;
      f.stack = stacks + i * kStack;
      f.tid = index_in(g.block_dim, t);
      w.lane[f.lane] = &f;
      w.ready |= 1u << f.lane;
      w.done &= ~(1u << f.lane);
      EMU_TSAN(f.tsan = __tsan_create_fiber(0); char name[64];
               snprintf(name, sizeof name, "block %u thread %u", first + b, t); __tsan_set_fiber_name(f.tsan, name);)
      prepare(f);
    }
  }
  switch_to(pick()); // comes back when no thread can run
  EMU_TSAN(for (unsigned i = 0; i < g.nfibers; ++i) retire(g.fibers[i].tsan, 512);)
  if (g.failed) throw std::runtime_error(g.error);
  for (unsigned i = 0; i < g.nfibers; ++i)
    if (!g.fibers[i].done) throw std::runtime_error(stuck());
}

inline void run(const fastloss::Launch &l, void (*call)(void *), void *ctx) {
  const char *order = getenv("EMU_ORDER"), *ok = getenv("EMU_EXITED_OK");
  g.order = !order || !strcmp(order, "asc") ? 0 : !strcmp(order, "desc") ? -1 : std::max(1, atoi(order));
  g.exited_ok = ok && *ok == '1';
  g.rng = 0x9e3779b97f4a7c15u * (g.order + 2);
  g.failed = false;
  g.nkeys = 0;
  g.static_used = 0;
  g.grid_dim = l.grid;
  g.block_dim = l.block;
  g.threads = l.block.x * l.block.y * l.block.z;
  g.warps = (g.threads + 31) / 32;
  g.cluster = l.cluster;
  g.nfibers = g.cluster * g.threads;
  g.nwarps = g.cluster * g.warps;
  g.call = call;
  g.ctx = ctx;
  g.dynamic = l.smem;
  g.smem = (l.smem + 15) / 16 * 16;
  g.shared_size = (g.smem + kStatic + 66 * kRed + 4095) / 4096 * 4096;
  const unsigned total = l.grid.x * l.grid.y * l.grid.z;
  if (!total || !g.threads || g.threads > 1024 || l.smem > kSharedMax || !l.cluster || l.cluster > 16 ||
      l.grid.x % l.cluster)
    throw std::runtime_error("launch: bad grid, block, shared memory or cluster size");
  cur = &g.main;
  EMU_TSAN(g.main.tsan = __tsan_get_current_fiber();)
  std::vector<unsigned> list(total / l.cluster);
  for (unsigned i = 0; i < list.size(); ++i) list[i] = i * l.cluster;
  if (g.order < 0) std::reverse(list.begin(), list.end());
  if (g.order > 0)
    for (unsigned i = unsigned(list.size()) - 1; i > 0; --i) std::swap(list[i], list[rnd(i + 1)]);
  for (unsigned first : list) run_cluster(first);
  EMU_TSAN(__tsan_acquire(&g.end_tag); retire(nullptr, 0);)
}
} // namespace emu

namespace fastloss {
template <class... P, class... A> void launch(const Launch &l, void (*kernel)(P...), A... a) {
  auto call = [&] { kernel(a...); };
  emu::run(l, [](void *c) { (*static_cast<decltype(call) *>(c))(); }, &call);
}
} // namespace fastloss
