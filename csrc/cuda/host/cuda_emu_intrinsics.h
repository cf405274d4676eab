// The device functions that kernels call, on the host. Included by cuda_emu.h, after the emulator; extend here when a
// kernel needs one more.
#pragma once

namespace emu {
struct Val {
  uint64_t v;
  unsigned src;
  uint64_t out;
};
template <class T> uint64_t to_bits(T v) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t b = 0;
  memcpy(&b, &v, sizeof v);
  return b;
}
template <class T> T from_bits(uint64_t b) {
  T v;
  memcpy(static_cast<void *>(&v), &b, sizeof v);
  return v;
}
#define EMU_LANES(i)                                                                                                   \
  for (unsigned i = 0; i < 32; ++i)                                                                                    \
    if (mask >> i & 1)
EMU_FN Val &val(Lanes &l, unsigned i) { return *static_cast<Val *>(l.arg[i]); }
EMU_FN void fin_shuffle(Lanes &l, unsigned mask) {
  EMU_LANES(i) {
    unsigned s = val(l, i).src;
    val(l, i).out = mask >> s & 1 ? val(l, s).v : ~0ull;
  }
} // from a lane not named: garbage
EMU_FN void fin_ballot(Lanes &l, unsigned mask) {
  unsigned b = 0;
  EMU_LANES(i) b |= unsigned(val(l, i).v != 0) << i;
  EMU_LANES(i) val(l, i).out = b;
}
EMU_FN void fin_match(Lanes &l, unsigned mask) {
  EMU_LANES(i) {
    unsigned b = 0;
    for (unsigned k = 0; k < 32; ++k)
      if (mask >> k & 1 && val(l, k).v == val(l, i).v) b |= 1u << k;
    val(l, i).out = b;
  }
}
template <int OP> EMU_FN void fin_reduce(Lanes &l, unsigned mask) {
  bool first = true;
  int64_t r = 0;
  EMU_LANES(i) {
    int64_t v = int64_t(val(l, i).v);
    r = first     ? v
        : OP == 0 ? r + v
        : OP == 1 ? std::min(r, v)
        : OP == 2 ? std::max(r, v)
        : OP == 3 ? r & v
        : OP == 4 ? r | v
                  : r ^ v;
    first = false;
  }
  EMU_LANES(i) val(l, i).out = uint64_t(r);
}
EMU_FN uint64_t lanes(unsigned mask, Finish fin, uint64_t v, unsigned src, Site s) {
  Val a{v, src, 0};
  collective(mask, fin, &a, s);
  return a.out;
}
EMU_FN unsigned src_lane(int mode, int arg, int width) {
  int lane = int(cur->lane), base = lane & ~(width - 1),
      s = mode == 0   ? base | (arg & (width - 1))
          : mode == 1 ? lane - arg
          : mode == 2 ? lane + arg
                      : lane ^ arg;
  return unsigned((mode == 1 && s < base) || (mode >= 2 && s >= base + width) ? lane : s);
}
template <class T> void aligned(const T *p, const char *what, const char *file, int line) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T))
    fail("%s: %zu bytes at an unaligned address, %s:%d", what, sizeof(T), file, line);
}
template <class T> using Same = std::common_type_t<T>; // keeps an argument out of deduction
template <class T, class F> T atomic(T *p, F next) {
  using U = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  auto *u = reinterpret_cast<U *>(p);
  U old = __atomic_load_n(u, __ATOMIC_ACQUIRE);
  while (!__atomic_compare_exchange_n(u, &old, U(to_bits<T>(next(from_bits<T>(old)))), false, __ATOMIC_ACQ_REL,
                                      __ATOMIC_ACQUIRE)) {
  }
  return from_bits<T>(old);
}
} // namespace emu

// ---- barriers and fences
inline void __syncthreads(EMU_AT) { emu::barrier(0, 0, 0, {"__syncthreads", file_, line_}); }
inline int __syncthreads_count(int p, EMU_AT) {
  return int(emu::barrier(0, 0, p != 0, {"__syncthreads_count", file_, line_}));
}
inline int __syncthreads_or(int p, EMU_AT) {
  return emu::barrier(0, 0, p != 0, {"__syncthreads_or", file_, line_}) != 0;
}
inline int __syncthreads_and(int p, EMU_AT) {
  return emu::barrier(0, 0, p == 0, {"__syncthreads_and", file_, line_}) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, EMU_AT) {
  emu::collective(mask, nullptr, nullptr, {"__syncwarp", file_, line_});
}
inline void __threadfence() {} // one OS thread: memory order is not modelled
inline void __threadfence_block() {}
inline void __threadfence_system() {}

// ---- warp
#define EMU_SHUFFLE(name, type, mode)                                                                                  \
  template <class T> T name(unsigned mask, T v, type arg, int width = 32, EMU_AT) {                                    \
    return emu::from_bits<T>(emu::lanes(mask, emu::fin_shuffle, emu::to_bits(v), emu::src_lane(mode, int(arg), width), \
                                        {#name, file_, line_}));                                                       \
  }
// clang-format off
EMU_SHUFFLE(__shfl_sync, int, 0)
EMU_SHUFFLE(__shfl_up_sync, unsigned, 1)
EMU_SHUFFLE(__shfl_down_sync, unsigned, 2)
EMU_SHUFFLE(__shfl_xor_sync, int, 3)
// clang-format on
inline unsigned __ballot_sync(unsigned mask, int p, EMU_AT) {
  return unsigned(emu::lanes(mask, emu::fin_ballot, p != 0, 0, {"__ballot_sync", file_, line_}));
}
inline int __any_sync(unsigned mask, int p, EMU_AT) {
  return emu::lanes(mask, emu::fin_ballot, p != 0, 0, {"__any_sync", file_, line_}) != 0;
}
inline int __all_sync(unsigned mask, int p, EMU_AT) {
  return emu::lanes(mask, emu::fin_ballot, p == 0, 0, {"__all_sync", file_, line_}) == 0;
}
template <class T> unsigned __match_any_sync(unsigned mask, T v, EMU_AT) {
  return unsigned(emu::lanes(mask, emu::fin_match, emu::to_bits(v), 0, {"__match_any_sync", file_, line_}));
}
template <class T> unsigned __match_all_sync(unsigned mask, T v, int *pred, EMU_AT) {
  *pred = unsigned(emu::lanes(mask, emu::fin_match, emu::to_bits(v), 0, {"__match_all_sync", file_, line_})) == mask;
  return *pred ? mask : 0;
}
#define EMU_REDUCE(name, op)                                                                                           \
  template <class T> T name(unsigned mask, T v, EMU_AT) {                                                              \
    return T(emu::lanes(mask, emu::fin_reduce<op>, uint64_t(int64_t(v)), 0, {#name, file_, line_}));                   \
  }
// clang-format off
EMU_REDUCE(__reduce_add_sync, 0)
EMU_REDUCE(__reduce_min_sync, 1)
EMU_REDUCE(__reduce_max_sync, 2)
EMU_REDUCE(__reduce_and_sync, 3)
EMU_REDUCE(__reduce_or_sync, 4)
EMU_REDUCE(__reduce_xor_sync, 5)
// clang-format on
unsigned __activemask() = delete; // what it returns is up to the compiler: write the mask out

// ---- atomics (float, bf16 and half too)
#define EMU_ATOMIC(name, expr)                                                                                         \
  template <class T> T name(T *p, emu::Same<T> v) {                                                                    \
    return emu::atomic(p, [v](T old) -> T {                                                                            \
      (void)old;                                                                                                       \
      return expr;                                                                                                     \
    });                                                                                                                \
  }
// clang-format off
EMU_ATOMIC(atomicAdd, T(old + v))
EMU_ATOMIC(atomicSub, T(old - v))
EMU_ATOMIC(atomicExch, v)
EMU_ATOMIC(atomicMin, v < old ? v : old)
EMU_ATOMIC(atomicMax, old < v ? v : old)
EMU_ATOMIC(atomicAnd, T(old & v))
EMU_ATOMIC(atomicOr, T(old | v))
EMU_ATOMIC(atomicXor, T(old ^ v))
EMU_ATOMIC(atomicInc, old >= v ? T(0) : T(old + 1))
EMU_ATOMIC(atomicDec, old == 0 || old > v ? v : T(old - 1))
// clang-format on
template <class T> T atomicCAS(T *p, emu::Same<T> compare, emu::Same<T> v) {
  return emu::atomic(p, [=](T old) -> T { return old == compare ? v : old; });
}

// ---- loads and stores with a cache hint: checked for alignment, as a plain dereference is by -fsanitize
#define EMU_LOAD(name)                                                                                                 \
  template <class T> T name(const T *p, EMU_AT) {                                                                      \
    emu::aligned(p, #name, file_, line_);                                                                              \
    return *p;                                                                                                         \
  }
#define EMU_STORE(name)                                                                                                \
  template <class T> void name(T *p, emu::Same<T> v, EMU_AT) {                                                         \
    emu::aligned(p, #name, file_, line_);                                                                              \
    *p = v;                                                                                                            \
  }
// clang-format off
EMU_LOAD(__ldg)
EMU_LOAD(__ldcs)
EMU_LOAD(__ldcg)
EMU_LOAD(__ldca)
EMU_LOAD(__ldlu)
EMU_LOAD(__ldcv)
EMU_STORE(__stcs)
EMU_STORE(__stcg)
EMU_STORE(__stwb)
EMU_STORE(__stwt)
// clang-format on
// ---- integer and float
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1) << (31 - i);
  return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned n) {
  return unsigned(((uint64_t(hi) << 32 | lo) << (n & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned n) {
  return unsigned((uint64_t(hi) << 32 | lo) >> (n & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
  uint64_t ab = uint64_t(b) << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    unsigned n = s >> 4 * i & 15, byte = unsigned(ab >> 8 * (n & 7)) & 255;
    r |= (n & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return r;
}
inline unsigned __float_as_uint(float f) { return emu::from_bits<unsigned>(emu::to_bits(f)); }
inline int __float_as_int(float f) { return emu::from_bits<int>(emu::to_bits(f)); }
inline float __uint_as_float(unsigned u) { return emu::from_bits<float>(emu::to_bits(u)); }
inline float __int_as_float(int u) { return emu::from_bits<float>(emu::to_bits(u)); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
template <class A, class B> std::common_type_t<A, B> min(A a, B b) {
  using C = std::common_type_t<A, B>;
  return C(b) < C(a) ? C(b) : C(a);
}
template <class A, class B> std::common_type_t<A, B> max(A a, B b) {
  using C = std::common_type_t<A, B>;
  return C(a) < C(b) ? C(b) : C(a);
}
[[noreturn]] inline void __trap(EMU_AT) { emu::fail("__trap, %s:%d", file_, line_); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __int2float_rn(int x) { return float(x); }

// ---- the PTX wrappers of common.cuh
namespace fastloss {
inline unsigned cluster_rank() { return emu::cur->block->rank; }
inline unsigned cluster_size() { return emu::g.cluster; }
template <class T> T *cluster_map(T *p, unsigned rank, EMU_AT) {
  return static_cast<T *>(emu::cluster_map(p, rank, {"cluster_map", file_, line_}));
}
inline void cluster_arrive(EMU_AT) { emu::cluster_arrive({"cluster_arrive", file_, line_}); }
inline void cluster_arrive_relaxed(EMU_AT) { emu::cluster_arrive({"cluster_arrive_relaxed", file_, line_}, true); }
using SharedAddress = char *;
inline SharedAddress shared_address(void *shared) { return static_cast<char *>(shared); }
inline void cluster_wait(EMU_AT) { emu::cluster_wait({"cluster_wait", file_, line_}); }
inline void cluster_sync(EMU_AT) {
  emu::cluster_arrive({"cluster_sync", file_, line_});
  emu::cluster_wait({"cluster_sync", file_, line_});
}
inline void cp_async16(void *shared, const void *global, unsigned bytes = 16, EMU_AT) {
  emu::cp_async(shared, global, bytes, {"cp_async16", file_, line_});
}
inline void cp_async8(void *shared, const void *global, EMU_AT) {
  emu::cp_async(shared, global, 8, {"cp_async8", file_, line_}, 8);
}
inline void cp_async_commit() { ++emu::cur->group; }
template <int LEFT> void cp_async_wait() { emu::cp_async_wait(LEFT); }
template <class T> T load_stream(const T *p, EMU_AT) {
  emu::aligned(p, "load_stream", file_, line_);
  return *p;
}
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0 : y;
}
} // namespace fastloss
