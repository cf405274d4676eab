// Tables of 256 bytes in registers (AVX-512 VBMI), for R8's loops.
#pragma once
#ifdef __x86_64__
#include "simd.h"

namespace fastloss {

#define FASTLOSS_VBMI_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,bmi,bmi2,lzcnt,popcnt"
#define FASTLOSS_VBMI __attribute__((target(FASTLOSS_VBMI_TARGET)))
#define FASTLOSS_VBMI_INLINE __attribute__((target(FASTLOSS_VBMI_TARGET), always_inline)) inline
#define FASTLOSS_VBMI_LAMBDA __attribute__((target(FASTLOSS_VBMI_TARGET), always_inline))

// Whether this machine runs what is marked FASTLOSS_VBMI; all that has VBMI2 has BMI2 and LZCNT.
inline bool has_byte_look_ups() {
  return __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
}

struct Bytes256 {
  __m512i part[4];
};

FASTLOSS_VBMI_INLINE Bytes256 load_bytes(const uint8_t *bytes) {
  return {{_mm512_loadu_si512(bytes), _mm512_loadu_si512(bytes + 64), _mm512_loadu_si512(bytes + 128),
           _mm512_loadu_si512(bytes + 192)}};
}

FASTLOSS_VBMI_INLINE __m512i look_up(const Bytes256 &table, __m512i index) {
  const __m512i low = _mm512_permutex2var_epi8(table.part[0], index, table.part[1]);
  const __m512i high = _mm512_permutex2var_epi8(table.part[2], index, table.part[3]);
  return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(index), high);
}

} // namespace fastloss
#endif
