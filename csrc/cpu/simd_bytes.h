// A vocabulary of vectors of bytes, for the planes of a compressed tensor (docs/design.md, "The lossless contract"):
// scalar, AVX2, and AVX-512 with VBMI, whose permutations of bytes are what these kernels live on. `write_pairs` and
// `write_fours` put bytes of the same number behind one another: kWidth numbers of 2 or 4 bytes.
#pragma once
#include "cpu.h"

#include <cstdint>
#include <cstring>
#ifdef __x86_64__
#include <immintrin.h>
// GCC 12 takes the deliberately undefined operands inside its own AVX-512 intrinsics for mistakes of ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace fastloss {

enum ByteIsa : int { kScalarBytes = 0, kAvx2Bytes = 1, kAvx512Bytes = 2 };

// The vocabulary for an `isa` of cpu.h; an AVX-512 machine without VBMI takes AVX2.
inline ByteIsa byte_isa(int isa) {
  if (isa == kBestIsa) isa = best_isa();
#ifdef __x86_64__
  if (isa >= kAvx512 && __builtin_cpu_supports("avx512vbmi")) return kAvx512Bytes;
  if (isa >= kAvx2) return kAvx2Bytes;
#endif
  return kScalarBytes;
}

namespace scalar {
#define FASTLOSS_WORD [[maybe_unused]] static inline
constexpr int64_t kBytes = 8;
typedef uint64_t Bytes; // eight at once
FASTLOSS_WORD Bytes load_bytes(const uint8_t *p) {
  Bytes a;
  memcpy(&a, p, sizeof a);
  return a;
}
FASTLOSS_WORD void store_bytes(uint8_t *p, Bytes a) { memcpy(p, &a, sizeof a); }
FASTLOSS_WORD void stream_bytes(uint8_t *p, Bytes a) { store_bytes(p, a); } // past the cache; p is a multiple of kBytes
FASTLOSS_WORD Bytes all_bytes(uint8_t a) { return a * 0x0101010101010101u; }
FASTLOSS_WORD Bytes and_bytes(Bytes a, Bytes b) { return a & b; }
FASTLOSS_WORD Bytes or_bytes(Bytes a, Bytes b) { return a | b; }
template <int N> FASTLOSS_WORD Bytes shift_left(Bytes a) { return (a << N) & all_bytes(uint8_t(0xff << N)); }
template <int N> FASTLOSS_WORD Bytes shift_right(Bytes a) { return (a >> N) & all_bytes(0xff >> N); }
// `value` in every byte whose bit, from bit `first` of `bits` on, is set; first is a multiple of kBytes.
FASTLOSS_WORD Bytes where_bits(const uint8_t *bits, int64_t first, uint8_t value) {
  const Bytes each = (bits[first / 8] * 0x0101010101010101u) & 0x8040201008040201u;
  const Bytes low = 0x7f7f7f7f7f7f7f7fu; // a byte's top bit says whether one of its bits is set
  return ((((each & low) + low) | each) >> 7 & 0x0101010101010101u) * value;
}
FASTLOSS_WORD uint64_t spread(uint64_t four) { // 4 bytes, each with a zero behind it
  four = (four | four << 16) & 0x0000ffff0000ffffu;
  return (four | four << 8) & 0x00ff00ff00ff00ffu;
}
FASTLOSS_WORD void write_pairs(uint8_t *out, Bytes low, Bytes high) {
  store_bytes(out, spread(low & 0xffffffffu) | spread(high & 0xffffffffu) << 8);
  store_bytes(out + 8, spread(low >> 32) | spread(high >> 32) << 8);
}
FASTLOSS_WORD void write_fours(uint8_t *out, Bytes a, Bytes b, Bytes c, Bytes d) {
  for (int i = 0; i < 8; ++i, out += 4) {
    const uint32_t number = uint32_t(a >> 8 * i & 255) | uint32_t(b >> 8 * i & 255) << 8 |
                            uint32_t(c >> 8 * i & 255) << 16 | uint32_t(d >> 8 * i & 255) << 24;
    memcpy(out, &number, sizeof number);
  }
}
#undef FASTLOSS_WORD
} // namespace scalar

#ifdef __x86_64__

namespace avx2 {
#define FASTLOSS_AVX2_BYTES "avx2"
#define FASTLOSS_WORD [[maybe_unused]] static inline __attribute__((target(FASTLOSS_AVX2_BYTES), always_inline))
constexpr int64_t kBytes = 32;
typedef __m256i Bytes;
FASTLOSS_WORD Bytes load_bytes(const uint8_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
FASTLOSS_WORD void store_bytes(uint8_t *p, Bytes a) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), a); }
FASTLOSS_WORD void stream_bytes(uint8_t *p, Bytes a) { _mm256_stream_si256(reinterpret_cast<__m256i *>(p), a); }
FASTLOSS_WORD Bytes all_bytes(uint8_t a) { return _mm256_set1_epi8(char(a)); }
FASTLOSS_WORD Bytes and_bytes(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
FASTLOSS_WORD Bytes or_bytes(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
template <int N> FASTLOSS_WORD Bytes shift_left(Bytes a) {
  return _mm256_and_si256(_mm256_slli_epi16(a, N), all_bytes(uint8_t(0xff << N)));
}
template <int N> FASTLOSS_WORD Bytes shift_right(Bytes a) {
  return _mm256_and_si256(_mm256_srli_epi16(a, N), all_bytes(0xff >> N));
}
FASTLOSS_WORD Bytes where_bits(const uint8_t *bits, int64_t first, uint8_t value) {
  int32_t word;
  memcpy(&word, bits + first / 8, sizeof word);
  const Bytes bit = _mm256_set1_epi64x(int64_t(0x8040201008040201u));
  const Bytes byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const Bytes own = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(word), byte), bit);
  return _mm256_and_si256(_mm256_cmpeq_epi8(own, bit), all_bytes(value));
}
// The 16-bit words (a0 b0, a1 b1, ...) in order, as two vectors.
FASTLOSS_WORD void interleave(Bytes a, Bytes b, Bytes &first, Bytes &second) {
  const Bytes even = _mm256_unpacklo_epi8(a, b), odd = _mm256_unpackhi_epi8(a, b);
  first = _mm256_permute2x128_si256(even, odd, 0x20), second = _mm256_permute2x128_si256(even, odd, 0x31);
}
FASTLOSS_WORD void write_pairs(uint8_t *out, Bytes low, Bytes high) {
  Bytes first, second;
  interleave(low, high, first, second);
  store_bytes(out, first), store_bytes(out + kBytes, second);
}
FASTLOSS_WORD void write_fours(uint8_t *out, Bytes a, Bytes b, Bytes c, Bytes d) {
  Bytes low[2], high[2];
  interleave(a, b, low[0], low[1]), interleave(c, d, high[0], high[1]);
  for (int half = 0; half < 2; ++half, out += 2 * kBytes) {
    const Bytes even = _mm256_unpacklo_epi16(low[half], high[half]), odd = _mm256_unpackhi_epi16(low[half], high[half]);
    store_bytes(out, _mm256_permute2x128_si256(even, odd, 0x20));
    store_bytes(out + kBytes, _mm256_permute2x128_si256(even, odd, 0x31));
  }
}
#undef FASTLOSS_WORD
} // namespace avx2

namespace avx512vbmi {
#define FASTLOSS_AVX512_BYTES "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi"
#define FASTLOSS_WORD [[maybe_unused]] static inline __attribute__((target(FASTLOSS_AVX512_BYTES), always_inline))
constexpr int64_t kBytes = 64;
typedef __m512i Bytes;
FASTLOSS_WORD Bytes load_bytes(const uint8_t *p) { return _mm512_loadu_si512(p); }
FASTLOSS_WORD void store_bytes(uint8_t *p, Bytes a) { _mm512_storeu_si512(p, a); }
FASTLOSS_WORD void stream_bytes(uint8_t *p, Bytes a) { _mm512_stream_si512(reinterpret_cast<__m512i *>(p), a); }
FASTLOSS_WORD Bytes all_bytes(uint8_t a) { return _mm512_set1_epi8(char(a)); }
FASTLOSS_WORD Bytes and_bytes(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
FASTLOSS_WORD Bytes or_bytes(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
template <int N> FASTLOSS_WORD Bytes shift_left(Bytes a) {
  return _mm512_and_si512(_mm512_slli_epi16(a, N), all_bytes(uint8_t(0xff << N)));
}
template <int N> FASTLOSS_WORD Bytes shift_right(Bytes a) {
  return _mm512_and_si512(_mm512_srli_epi16(a, N), all_bytes(0xff >> N));
}
FASTLOSS_WORD Bytes where_bits(const uint8_t *bits, int64_t first, uint8_t value) {
  uint64_t word;
  memcpy(&word, bits + first / 8, sizeof word);
  return _mm512_maskz_set1_epi8(word, char(value));
}
// Of the bytes a0..a63, b0..b63: a0 b0 a1 b1 ..., the first half or the second.
alignas(64) constexpr uint8_t kInterleaved[2][64] = {
    {0,  64, 1,  65, 2,  66, 3,  67, 4,  68, 5,  69, 6,  70, 7,  71, 8,  72, 9,  73, 10, 74,
     11, 75, 12, 76, 13, 77, 14, 78, 15, 79, 16, 80, 17, 81, 18, 82, 19, 83, 20, 84, 21, 85,
     22, 86, 23, 87, 24, 88, 25, 89, 26, 90, 27, 91, 28, 92, 29, 93, 30, 94, 31, 95},
    {32, 96,  33, 97,  34, 98,  35, 99,  36, 100, 37, 101, 38, 102, 39, 103, 40, 104, 41, 105, 42, 106,
     43, 107, 44, 108, 45, 109, 46, 110, 47, 111, 48, 112, 49, 113, 50, 114, 51, 115, 52, 116, 53, 117,
     54, 118, 55, 119, 56, 120, 57, 121, 58, 122, 59, 123, 60, 124, 61, 125, 62, 126, 63, 127}};
FASTLOSS_WORD void interleave(Bytes a, Bytes b, Bytes &first, Bytes &second) {
  first = _mm512_permutex2var_epi8(a, load_bytes(kInterleaved[0]), b);
  second = _mm512_permutex2var_epi8(a, load_bytes(kInterleaved[1]), b);
}
FASTLOSS_WORD void write_pairs(uint8_t *out, Bytes low, Bytes high) {
  Bytes first, second;
  interleave(low, high, first, second);
  store_bytes(out, first), store_bytes(out + kBytes, second);
}
FASTLOSS_WORD void write_fours(uint8_t *out, Bytes a, Bytes b, Bytes c, Bytes d) {
  Bytes low[2], high[2];
  interleave(a, b, low[0], low[1]), interleave(c, d, high[0], high[1]);
  const Bytes order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const Bytes behind = _mm512_add_epi16(order, _mm512_set1_epi16(16));
  for (int half = 0; half < 2; ++half, out += 2 * kBytes) {
    store_bytes(out, _mm512_permutex2var_epi16(low[half], order, high[half]));
    store_bytes(out + kBytes, _mm512_permutex2var_epi16(low[half], behind, high[half]));
  }
}
#undef FASTLOSS_WORD
} // namespace avx512vbmi

#endif

} // namespace fastloss
