// The state of the emulated device, and how one fiber gives way to another.
#pragma once

namespace emu {
constexpr size_t kStatic = 48 << 10, kSharedMax = 227 << 10, kRed = 64;
constexpr size_t kStack = 64 << 10 EMU_ASAN(<< 1) EMU_TSAN(<< 1);

constexpr unsigned kCopies = 64; // cp.async in flight in a thread

struct Warp;
struct Block;

struct Site { // an intrinsic, and where it was called
  const char *what = "", *file = "";
  int line = 0;
};
struct Copy { // one cp.async in flight
  char *dst;
  const char *src;
  unsigned size, group, width;
};
struct Fiber {
  void *sp;
  Block *block;
  Warp *warp;
  const void *wait; // what it waits for, null when it can run
  uint3 tid;
  unsigned lane, rank;
  Site at;
  bool done;
  unsigned cluster_phase;
  bool cluster_arrived;
  unsigned group, copies; // of cp.async
  Copy copy[kCopies];
  char *stack;
  void *fake, *tsan;
};
struct Lanes {
  void *arg[32];
};
using Finish = void (*)(Lanes &, unsigned mask); // run by the last lane to arrive, on the operands of all
struct Warp {
  Fiber *lane[32];
  Lanes args;
  unsigned mask[32], ready, waiting, done, phase;
  char tag[2];
};
struct Barrier {
  unsigned arrived, phase, count, result;
  Site first;
  char tag[2], read_tag;
};
struct Block {
  uint3 idx;
  unsigned rank, live;
  Fiber *fibers;
  char *shared;
  Barrier bar[16];
  char end_tag;
};
struct Key { // a static shared array and its place in every block
  const void *key;
  size_t offset;
};
struct State {
  dim3 grid_dim, block_dim;
  unsigned threads, warps, cluster, nfibers, nwarps;
  size_t dynamic, smem, shared_size;
  Fiber main, *fibers;
  Warp *warp, *warp_now;
  Block *blocks;
  Barrier cluster_bar;
  Key keys[64];
  unsigned nkeys;
  size_t static_used;
  int order; // 0 ascending, -1 descending, else the seed of a random order
  uint64_t rng;
  bool exited_ok, failed;
  char error[1024], end_tag;
  Fiber *from;
  void (*call)(void *);
  void *ctx;
};
inline State g;
inline Fiber *cur;

EMU_FN unsigned rnd(unsigned n) {
  g.rng ^= g.rng << 13;
  g.rng ^= g.rng >> 7;
  g.rng ^= g.rng << 17;
  return unsigned(g.rng >> 20) % n;
}

void entry();

#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
// Saves what a callee must keep, changes stacks, returns there.
inline __attribute__((naked, noinline, noipa)) void swap(void **, void *) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15; movq %rsp, (%rdi); movq %rsi, %rsp;"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
EMU_FN void prepare(Fiber &f) {
  auto **top = reinterpret_cast<void **>(f.stack + kStack);
  top[-2] = reinterpret_cast<void *>(&entry);
  f.sp = top - 8;
}
#else // slower: swapcontext makes a system call
EMU_FN void swap(void **from, void *to) {
  if (!*from) *from = new ucontext_t;
  swapcontext(static_cast<ucontext_t *>(*from), static_cast<ucontext_t *>(to));
}
EMU_FN void prepare(Fiber &f) {
  auto *u = static_cast<ucontext_t *>(f.sp ? f.sp : (f.sp = new ucontext_t));
  getcontext(u);
  u->uc_stack.ss_sp = f.stack;
  u->uc_stack.ss_size = kStack;
  u->uc_link = nullptr;
  makecontext(u, &entry, 0);
}
#endif

EMU_FN void switch_to(Fiber *to, [[maybe_unused]] bool dying = false) {
  Fiber *from = g.from = cur;
  cur = to;
  // The main fiber's stack size stands in its tid (in pages): it is known only once a fiber has started from it.
  EMU_ASAN(__sanitizer_start_switch_fiber(dying ? nullptr : &from->fake, to->stack,
                                          to == &g.main ? size_t(to->tid.x) << 12 : kStack);)
  EMU_TSAN(__tsan_switch_to_fiber(to->tsan, __tsan_switch_to_fiber_no_sync);)
  swap(&from->sp, to->sp);
  EMU_ASAN(__sanitizer_finish_switch_fiber(from->fake, nullptr, nullptr);)
}

// The next thread to run. A warp keeps running while it can, so that warps drift as far apart as barriers let them.
EMU_FN Fiber *pick() {
  Warp *w = g.warp_now;
  if (!w || !w->ready || (g.order > 0 && rnd(16) == 0)) {
    const unsigned first = g.order > 0 ? rnd(g.nwarps) : 0;
    w = nullptr;
    for (unsigned i = 0; i < g.nwarps && !w; ++i) {
      const unsigned k = g.order < 0 ? g.nwarps - 1 - i : (first + i) % g.nwarps;
      if (g.warp[k].ready) w = &g.warp[k];
    }
    if (!w) return &g.main;
  }
  unsigned r = w->ready, lane = g.order < 0 ? 31 - __builtin_clz(r) : __builtin_ctz(r);
  if (g.order > 0) {
    for (unsigned k = rnd(__builtin_popcount(r)); k; --k) r &= r - 1;
    lane = __builtin_ctz(r);
  }
  w->ready &= ~(1u << lane);
  g.warp_now = w;
  return w->lane[lane];
}

EMU_FN void ready(Fiber *f) {
  f->wait = nullptr;
  f->warp->ready |= 1u << f->lane;
}

EMU_FN void wait_here(const void *on) {
  cur->wait = on;
  switch_to(pick());
}

// Ends the launch: the error is thrown on the main fiber.
[[noreturn]] EMU_FN void fail(const char *format, ...) {
  va_list v;
  va_start(v, format);
  vsnprintf(g.error, sizeof g.error, format, v);
  va_end(v);
  const size_t n = strlen(g.error);
  const uint3 b = cur->block->idx, t = cur->tid;
  snprintf(g.error + n, sizeof g.error - n, " [block %u,%u,%u thread %u,%u,%u]", b.x, b.y, b.z, t.x, t.y, t.z);
  g.failed = true;
  switch_to(&g.main, true);
  __builtin_unreachable();
}
} // namespace emu
