// A message is a polynomial over GF(2), a checksum its remainder. Folding (Gopal et al., "Fast CRC Computation for
// Generic Polynomials Using PCLMULQDQ Instruction") takes a vector that stands D bits before another one to what has
// the same remainder there: its halves times x^(D + 64) and x^D.
#include "crc32c.h"
#include "bit_blocks.h"

#include <array>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
// GCC 12 takes the deliberately undefined operands inside its own AVX-512 intrinsics for mistakes of ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace fastloss {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78; // bit 31 - i is x^i, as in all remainders here

constexpr uint32_t times_x(uint32_t a) { return a >> 1 ^ (a & 1 ? kPolynomial : 0); }

constexpr uint32_t product(uint32_t a, uint32_t b) {
  uint32_t sum = 0;
  for (uint32_t bit = 1u << 31; bit; bit >>= 1, b = times_x(b))
    if (a & bit) sum ^= b;
  return sum;
}

constexpr uint32_t power_of_x(uint64_t n) {
  uint32_t result = 1u << 31, square = 1u << 30;
  for (; n; n >>= 1, square = product(square, square))
    if (n & 1) result = product(result, square);
  return result;
}

// Table k: the remainder of a byte with k zero bytes behind it.
struct Tables {
  uint32_t of[8][256];
};

constexpr Tables tables() {
  Tables made = {};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int i = 0; i < 8; ++i) crc = times_x(crc);
    made.of[0][byte] = crc;
  }
  for (int k = 1; k < 8; ++k)
    for (int byte = 0; byte < 256; ++byte) {
      const uint32_t before = made.of[k - 1][byte];
      made.of[k][byte] = before >> 8 ^ made.of[0][before & 255];
    }
  return made;
}

constexpr Tables kTables = tables();

uint32_t update_scalar(uint32_t crc, const uint8_t *data, int64_t bytes) {
  for (; bytes >= 8; bytes -= 8, data += 8) {
    uint64_t eight;
    memcpy(&eight, data, sizeof eight);
    eight ^= crc, crc = 0;
    for (int k = 0; k < 8; ++k) crc ^= kTables.of[7 - k][eight >> 8 * k & 255];
  }
  for (; bytes > 0; --bytes, ++data) crc = crc >> 8 ^ kTables.of[0][(crc ^ *data) & 255];
  return crc;
}

#ifdef __x86_64__

// What takes the halves of 16 bytes `bits` on. In reflected order a product of 64 by 64 bits comes out one bit low and
// the remainder has 32 bits fewer, hence 33 bits less and a factor of two more.
constexpr uint64_t fold_factor(int64_t bits) { return uint64_t(power_of_x(uint64_t(bits))) << 1; }
struct Factors {
  int64_t low, high;
};
constexpr Factors factors(int64_t bits) { return {int64_t(fold_factor(bits + 32)), int64_t(fold_factor(bits - 32))}; }

#define FASTLOSS_CRC "sse4.2,pclmul"
__attribute__((target(FASTLOSS_CRC))) uint32_t update_words(uint32_t crc, const uint8_t *data, int64_t bytes) {
  uint64_t wide = crc;
  for (; bytes >= 8; bytes -= 8, data += 8) {
    uint64_t eight;
    memcpy(&eight, data, sizeof eight);
    wide = _mm_crc32_u64(wide, eight);
  }
  crc = uint32_t(wide);
  for (; bytes > 0; --bytes, ++data) crc = _mm_crc32_u8(crc, *data);
  return crc;
}

__attribute__((target(FASTLOSS_CRC), always_inline)) inline __m128i fold(__m128i a, __m128i by, __m128i next) {
  return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(a, by, 0x00), _mm_clmulepi64_si128(a, by, 0x11)), next);
}
template <int64_t bits> __attribute__((target(FASTLOSS_CRC), always_inline)) inline __m128i factors128() {
  constexpr Factors f = factors(bits);
  return _mm_set_epi64x(f.high, f.low);
}
__attribute__((target(FASTLOSS_CRC), always_inline)) inline __m128i load128(const uint8_t *p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
}
// The remainder of 16 bytes.
__attribute__((target(FASTLOSS_CRC), always_inline)) inline uint32_t remainder(__m128i a) {
  return uint32_t(_mm_crc32_u64(_mm_crc32_u64(0, uint64_t(_mm_cvtsi128_si64(a))), uint64_t(_mm_extract_epi64(a, 1))));
}

__attribute__((target(FASTLOSS_CRC))) uint32_t update_pclmul(uint32_t crc, const uint8_t *data, int64_t bytes) {
  constexpr int kVectors = 4;
  if (bytes >= 32 * kVectors) {
    __m128i sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = load128(data + 16 * v);
    sums[0] = _mm_xor_si128(sums[0], _mm_cvtsi32_si128(int(crc)));
    const __m128i by = factors128<128 * kVectors>(), one = factors128<128>();
    for (bytes -= 16 * kVectors, data += 16 * kVectors; bytes >= 16 * kVectors;
         bytes -= 16 * kVectors, data += 16 * kVectors)
      for (int v = 0; v < kVectors; ++v) sums[v] = fold(sums[v], by, load128(data + 16 * v));
    for (int v = 1; v < kVectors; ++v) sums[v] = fold(sums[v - 1], one, sums[v]);
    crc = remainder(sums[kVectors - 1]);
  }
  return update_words(crc, data, bytes);
}

#define FASTLOSS_CRC512 "sse4.2,pclmul,vpclmulqdq,avx512f,avx512bw,avx512dq,avx512vl"
__attribute__((target(FASTLOSS_CRC512), always_inline)) inline __m512i fold(__m512i a, __m512i by, __m512i next) {
  return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(a, by, 0x00), _mm512_clmulepi64_epi128(a, by, 0x11), next,
                                   0x96);
}

__attribute__((target(FASTLOSS_CRC512))) uint32_t update_vpclmul(uint32_t crc, const uint8_t *data, int64_t bytes) {
  constexpr int kVectors = 8;
  if (bytes < 128 * kVectors) return update_pclmul(crc, data, bytes);
  __m512i sums[kVectors];
  for (int v = 0; v < kVectors; ++v) sums[v] = _mm512_loadu_si512(data + 64 * v);
  sums[0] = _mm512_xor_si512(sums[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(int(crc))));
  const __m512i by = _mm512_broadcast_i32x4(factors128<512 * kVectors>());
  for (bytes -= 64 * kVectors, data += 64 * kVectors; bytes >= 64 * kVectors;
       bytes -= 64 * kVectors, data += 64 * kVectors)
    for (int v = 0; v < kVectors; ++v) sums[v] = fold(sums[v], by, _mm512_loadu_si512(data + 64 * v));
  const __m512i one = _mm512_broadcast_i32x4(factors128<512>());
  for (int v = 1; v < kVectors; ++v) sums[v] = fold(sums[v - 1], one, sums[v]);
  alignas(64) uint8_t last[64];
  _mm512_store_si512(last, sums[kVectors - 1]);
  __m128i sum = load128(last);
  for (int v = 1; v < 4; ++v) sum = fold(sum, factors128<128>(), load128(last + 16 * v));
  return update_pclmul(remainder(sum), data, bytes);
}

#endif

constexpr int64_t kPiece = int64_t(1) << 18; // bytes of a long block that one thread takes

} // namespace

Crc32c::Crc32c(int isa) : update_(update_scalar) {
  const int level = level_for(isa);
#ifdef __x86_64__
  if (level >= kAvx2 && __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul")) {
    update_ = update_pclmul;
    if (level >= kAvx512 && __builtin_cpu_supports("vpclmulqdq")) update_ = update_vpclmul;
  }
#endif
  (void)level;
}

uint32_t Crc32c::joined(uint32_t first, uint32_t second, int64_t bytes) {
  return product(first, power_of_x(8 * uint64_t(bytes))) ^ second;
}

void crc32c_cpu(const uint8_t *data, int64_t bytes, int64_t block, int64_t *crcs, int isa) {
  const Crc32c crc(isa);
  const int64_t blocks = bytes / block + (bytes % block != 0);
  const int64_t pieces = (std::min(block, bytes) + kPiece - 1) / kPiece, tasks = blocks * pieces;
  std::vector<uint32_t> parts(pieces > 1 ? size_t(tasks) : 0);
  const auto end_of = [&](int64_t b) { return std::min(bytes - b * block, block); };
  const int threads = bytes <= kPiece ? 1 : int(std::min<int64_t>(omp_get_max_threads(), tasks));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t b = task / pieces, from = task % pieces * kPiece;
    const int64_t size = pieces > 1 ? std::max<int64_t>(0, std::min(end_of(b) - from, kPiece)) : end_of(b);
    const uint32_t value = crc.of(data + b * block + from, size);
    if (pieces > 1) parts[size_t(task)] = value;
    else crcs[b] = value;
  }
  if (pieces == 1) return;
  const uint32_t whole = power_of_x(8 * uint64_t(kPiece));
  for (int64_t b = 0; b < blocks; ++b) {
    uint32_t value = parts[size_t(b * pieces)];
    for (int64_t from = kPiece, p = 1; p < pieces && from < end_of(b); from += kPiece, ++p) {
      const int64_t size = std::min(end_of(b) - from, kPiece);
      value = product(value, size == kPiece ? whole : power_of_x(8 * uint64_t(size))) ^ parts[size_t(b * pieces + p)];
    }
    crcs[b] = value;
  }
}

} // namespace fastloss
