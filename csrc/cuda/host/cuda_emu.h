// Runs CUDA C++ kernels on the host, from the same source, so that their logic can be tested without a GPU.
//
// One OS thread. A CUDA thread is a fiber; it runs until it reaches a barrier or a warp intrinsic, then another fiber
// runs. The blocks of one cluster live together, clusters run one after another. What a GPU leaves to chance, EMU_ORDER
// decides: "asc" (default) and "desc" order warps, lanes and clusters; a number is the seed of a random order. With
// -fsanitize=address shared arrays have red zones; with -fsanitize=thread every CUDA thread is a thread to the race
// detector, and only what CUDA promises (barriers, __syncwarp, atomics) orders two threads.
//
// What it cannot see: memory order weaker than acquire/release, a spin on another thread (hangs), bank conflicts,
// registers, speed, and whether the PTX in common.cuh does what its twin here does.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <sys/mman.h>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMU_ASAN(...) __VA_ARGS__
#else
#define EMU_ASAN(...)
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define EMU_TSAN(...) __VA_ARGS__
#else
#define EMU_TSAN(...)
#endif
#if !defined(__x86_64__) || defined(EMU_UCONTEXT)
#include <ucontext.h>
#endif

#undef __shared__
#undef __launch_bounds__
#undef __forceinline__
#undef __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __grid_constant__
#define threadIdx (emu::cur->tid)
#define blockIdx (emu::cur->block->idx)
#define blockDim (emu::g.block_dim)
#define gridDim (emu::g.grid_dim)

// A plain `__shared__` stays undefined on purpose: one copy a block, red zones and NaN filling need these two.
#define SHARED_DYNAMIC(T, name) T *const name = static_cast<T *>(emu::shared_dynamic())
#define SHARED_ARRAY(T, name, ...) /* e.g. SHARED_ARRAY(float, part, [2][32]) */                                       \
  using name##_type = T __VA_ARGS__;                                                                                   \
  static char name##_key;                                                                                              \
  name##_type &name = *static_cast<name##_type *>(emu::shared_static(&name##_key, sizeof(name##_type)))

// The emulator itself is not under test.
#define EMU_FN inline __attribute__((noinline, no_sanitize("thread"), no_sanitize("address")))
// Where the caller stands, for messages.
#define EMU_AT const char *file_ = __builtin_FILE(), int line_ = __builtin_LINE()

namespace fastloss {
struct Launch {
  dim3 grid, block;
  size_t smem = 0;
  unsigned cluster = 1;
  void *stream = nullptr;
};
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
} // namespace fastloss

#include "emu_fibers.h"
#include "emu_memory.h"
#include "emu_sync.h"

#include "emu_launch.h"

#include "cuda_emu_intrinsics.h"
#include "emu_mma.h"
