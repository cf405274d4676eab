// Barriers of a block and of a cluster, and what the lanes of a warp do together.
#pragma once

namespace emu {
// ---- An exited thread never arrives: an error here, though a GPU lets it pass (EMU_EXITED_OK=1 does as the GPU does).
EMU_FN void complete(Barrier &b, Fiber *first, unsigned n) {
  b.arrived = 0;
  ++b.phase;
  b.result = b.count;
  b.count = 0;
  for (unsigned i = 0; i < n; ++i)
    if (first[i].wait == &b) ready(first + i);
}

// need 0: all threads of the block. Returns how many voted.
EMU_FN unsigned barrier(unsigned id, unsigned need, unsigned vote, Site s) {
  Fiber *f = cur;
  Block &k = *f->block;
  Barrier &b = k.bar[id];
  f->at = s;
  if (!need) {
    need = g.exited_ok ? k.live : g.threads;
    if (b.arrived && (b.first.line != s.line || strcmp(b.first.file, s.file)))
      fail("divergent %s: %s:%d here, %s:%d in another thread", s.what, s.file, s.line, b.first.file, b.first.line);
  }
  b.first = s;
  b.count += vote;
  [[maybe_unused]] const unsigned phase = b.phase & 1;
  EMU_TSAN(__tsan_release(&b.tag[phase]);)
  if (++b.arrived == need) complete(b, k.fibers, g.threads);
  else wait_here(&b);
  EMU_TSAN(__tsan_acquire(&b.tag[phase]);)
  return b.result;
}

EMU_FN unsigned cluster_need() {
  unsigned n = 0;
  for (unsigned i = 0; i < g.cluster; ++i) n += g.blocks[i].live;
  return g.exited_ok ? n : g.nfibers;
}

EMU_FN void cluster_arrive(Site s, [[maybe_unused]] bool relaxed = false) {
  Fiber *f = cur;
  Barrier &b = g.cluster_bar;
  f->at = s;
  if (f->cluster_arrived) fail("cluster barrier: arrived twice without a wait, %s:%d", s.file, s.line);
  f->cluster_arrived = true;
  f->cluster_phase = b.phase;
  // Relaxed, it orders what was read before it with the end of the block that was read from, and nothing else.
  EMU_TSAN(__tsan_release(relaxed ? &b.read_tag : &b.tag[b.phase & 1]);)
  if (++b.arrived == cluster_need()) complete(b, g.fibers, g.nfibers);
}

EMU_FN void cluster_wait(Site s) {
  Fiber *f = cur;
  Barrier &b = g.cluster_bar;
  f->at = s;
  if (!f->cluster_arrived) fail("cluster barrier: wait without arrive, %s:%d", s.file, s.line);
  if (f->cluster_phase == b.phase) wait_here(&b);
  f->cluster_arrived = false;
  EMU_TSAN(__tsan_acquire(&b.tag[f->cluster_phase & 1]);)
}

// ---- warp: operands stay on the lanes' own stacks; the last lane named in the mask computes every result
EMU_FN bool try_finish(Warp &w, unsigned mask, Finish finish) {
  const unsigned live = g.exited_ok ? mask & ~w.done : mask;
  if ((w.waiting & live) != live) return false;
  const Site s = w.lane[__builtin_ctz(live)]->at;
  for (unsigned i = 0; i < 32; ++i)
    if (live >> i & 1 && (w.mask[i] != mask || strcmp(w.lane[i]->at.what, s.what))) {
      const Site &other = w.lane[i]->at;
      fail("lanes of one mask disagree: %s mask %08x (%s:%d), lane %u: %s mask %08x (%s:%d)", s.what, mask, s.file,
           s.line, i, other.what, w.mask[i], other.file, other.line);
    }
  if (finish) finish(w.args, live);
  else ++w.phase;
  w.waiting &= ~live;
  w.ready |= live;
  return true;
}

EMU_FN void collective(unsigned mask, Finish finish, void *args, Site s) {
  Fiber *f = cur;
  Warp &w = *f->warp;
  const unsigned bit = 1u << f->lane;
  [[maybe_unused]] const unsigned phase = w.phase & 1;
  f->at = s;
  if (!(mask & bit))
    fail("%s: mask %08x does not name the calling lane %u, %s:%d", s.what, mask, f->lane, s.file, s.line);
  if (!g.exited_ok && (mask & w.done))
    fail("%s: mask %08x names lanes that exited or never were (%08x), %s:%d", s.what, mask, w.done, s.file, s.line);
  w.mask[f->lane] = mask;
  w.args.arg[f->lane] = args;
  w.waiting |= bit;
  EMU_TSAN(if (!finish) __tsan_release(&w.tag[phase]);) // a shuffle orders no memory, __syncwarp does
  if (try_finish(w, mask, finish)) w.ready &= ~bit;
  else wait_here(reinterpret_cast<const void *>(finish));
  EMU_TSAN(if (!finish) __tsan_acquire(&w.tag[phase]);)
}
} // namespace emu
