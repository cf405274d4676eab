// The AMX engine: a product of 32 x 32 is four tiles of 16 x 16, two tiles of each operand feed them.
#pragma once
#include "linear_tiles.h"

#ifdef __x86_64__
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define FASTLOSS_AMX __attribute__((target(FASTLOSS_AVX512_TARGET ",amx-tile,amx-bf16"), noinline))

namespace fastloss::linear {

// Whether the processor has tiles and the instruction of `bit` (cpuid 7, edx). Tile registers hold 8 KB a thread; Linux
// hands them out on request, once a process.
inline bool has_amx([[maybe_unused]] unsigned bit) {
#ifdef __linux__
  constexpr unsigned kTileBit = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (bit | kTileBit)) != (bit | kTileBit)) return false;
  static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
#else
  return false;
#endif
}
inline bool has_amx_bf16() { return has_amx(1u << 22); }
inline bool has_amx_int8() { return has_amx(1u << 25); }

struct AmxTiles : Bf16Tiles {
  static constexpr bool kFast = true; // a product costs less than the memory traffic that would save it
  // Each thread tells the processor the shape of its tiles: all eight are 16 rows of 64 bytes.
  static FASTLOSS_AMX void begin() {
    struct alignas(64) Configuration {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    asm volatile("" ::"r"(&configuration) : "memory"); // GCC 12 believes that only its first bytes are read
    _tile_loadconfig(&configuration);
  }
  static FASTLOSS_AMX void end() { _tile_release(); }

  // The tile unit works by itself for 64 cycles a step: time for `work` on the vector units.
  template <class Work>
  static FASTLOSS_AMX void multiply(const uint32_t *left, const uint32_t *right, int64_t steps, float *product,
                                    bool accumulate, Work &shared_work) {
    Work work = shared_work; // a copy lives in registers
    const int64_t pairs = (kTile / 2 + steps - 1) / steps;
    constexpr int kLeftRow = 64, kWideRow = 128;
    asm volatile("" ::: "memory"); // GCC's tile loads do not say that they read memory
    if (accumulate) {
      _tile_loadd(0, product, kWideRow);
      _tile_loadd(1, product + 16, kWideRow);
      _tile_loadd(2, product + 16 * kTile, kWideRow);
      _tile_loadd(3, product + 16 * kTile + 16, kWideRow);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; ++step, left += kBlock, right += kBlock) {
      _tile_loadd(6, right, kWideRow);
      _tile_loadd(4, left, kLeftRow);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, left + 16 * kStepUnits, kLeftRow);
      _tile_dpbf16ps(2, 5, 6);
      _tile_loadd(7, right + 16, kWideRow);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
      for (int64_t pair = 0; pair < pairs && work.pending(); ++pair) work.two_rows();
    }
    shared_work = work;
    _tile_stored(0, product, kWideRow);
    _tile_stored(1, product + 16, kWideRow);
    _tile_stored(2, product + 16 * kTile, kWideRow);
    _tile_stored(3, product + 16 * kTile + 16, kWideRow);
  }
};

} // namespace fastloss::linear

#endif
