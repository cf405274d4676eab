// One small vector vocabulary for four instruction sets. A kernel body (*.inc) is written once on these words and
// included once in each namespace. Every function carries its own target attribute, so a file compiled for baseline
// x86-64 still holds AVX-512. All arithmetic is fp32; fp16 and bf16 are widened by `load` and rounded to nearest even
// by `store`.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#ifdef __x86_64__
#include <immintrin.h>
// GCC 12 takes the deliberately undefined operands inside its own AVX-512 intrinsics for mistakes of ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace fastloss {

struct Float16 {
  _Float16 value;
};
struct BFloat16 {
  uint16_t bits;
};

constexpr float kLog2e = 1.44269504f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline float to_float(float x) { return x; }
inline float to_float(uint8_t x) { return x; }
inline float to_float(Float16 x) { return float(x.value); }
inline float to_float(BFloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}
inline void from_float(float &to, float x) { to = x; }
inline void from_float(Float16 &to, float x) { to.value = _Float16(x); }
inline void from_float(BFloat16 &to, float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  to.bits = uint16_t(x != x ? 0x7fc0 : rounded >> 16);
}

// 2^f on [0, 1) as a polynomial: relative error 1.9e-9 before rounding.
constexpr float kExp2[] = {0x1p+0f,      0x1.62e42ap-1f,  0x1.ebfd9ep-3f, 0x1.c685p-5f,
                           0x1.3d28p-7f, 0x1.461956p-10f, 0x1.c72118p-13f};
// tanh(x) = x + x^3 P(x^2) below kTanhSmall, where the form with an exponential would cancel (coefficients of Cephes).
constexpr float kTanh[] = {-3.33332819422e-1f, 1.33314422036e-1f, -5.37397155531e-2f, 2.06390887954e-2f,
                           -5.70498872745e-3f};
constexpr float kTanhSmall = 0.625f;
// log(1 + f) = f - f^2/2 + f^3 P(f) for 1 + f in [sqrt(1/2), sqrt(2)]: relative error 5.9e-9 before rounding.
constexpr float kLog1p[] = {0x1.555554p-2f, -0x1.000226p-2f, 0x1.99a008p-3f, -0x1.547244p-3f,
                            0x1.22da1cp-3f, -0x1.0d8544p-3f, 0x1.055b72p-3f, -0x1.38b588p-4f};
constexpr int kHalfRoot = 0x3f3504f3; // the bits of sqrt(1/2)
constexpr float kLn2Float = 0x1.62e43p-1f;

// ---- The words. maximum(a, b) is b when either is NaN. `stream_pair` writes 2 * kWidth values past the cache, to an
// address aligned to their size or to 64 bytes. `scaled(z, c, k)` is z * c - k rounded once. log1p takes (-1, 1] and is
// off by 2 units at most; log_near_one(t, x) is log t of a normal t whose x = t - 1 has digits that t has lost.
// lanes_above(a, b) has a bit for each lane whose a is not <= b: above it, or one of them NaN.

namespace scalar {
#define FASTLOSS_WORD static inline
struct Vector {
  float value;
};
constexpr int kWidth = 1;
FASTLOSS_WORD Vector set(float a) { return {a}; }
FASTLOSS_WORD Vector add(Vector a, Vector b) { return {a.value + b.value}; }
FASTLOSS_WORD Vector subtract(Vector a, Vector b) { return {a.value - b.value}; }
FASTLOSS_WORD Vector multiply(Vector a, Vector b) { return {a.value * b.value}; }
FASTLOSS_WORD Vector divide(Vector a, Vector b) { return {a.value / b.value}; }
FASTLOSS_WORD Vector multiply_add(Vector a, Vector b, Vector c) { return {a.value * b.value + c.value}; }
FASTLOSS_WORD Vector maximum(Vector a, Vector b) { return {a.value > b.value ? a.value : b.value}; }
FASTLOSS_WORD Vector where_less(Vector a, Vector b, Vector yes, Vector no) { return a.value < b.value ? yes : no; }
FASTLOSS_WORD unsigned lanes_above(Vector a, Vector b) { return !(a.value <= b.value); }
FASTLOSS_WORD float sum(Vector a) { return a.value; }
FASTLOSS_WORD float largest(Vector a) { return a.value; }
template <class T> FASTLOSS_WORD Vector load(const T *p) { return {to_float(*p)}; }
template <class T> FASTLOSS_WORD Vector load_part(const T *p, int64_t, float) { return load(p); }
template <class T> FASTLOSS_WORD void store(T *p, Vector a) { from_float(*p, a.value); }
template <class T> FASTLOSS_WORD void store_part(T *p, Vector a, int64_t) { store(p, a); }
template <class T> FASTLOSS_WORD void stream_pair(T *p, Vector a, Vector b) { store(p, a), store(p + 1, b); }
// Baseline x86-64 has no fused multiply; two products that nearly cancel need one.
FASTLOSS_WORD Vector scaled(Vector z, Vector c, Vector k) { return {float(double(z.value) * c.value - k.value)}; }
FASTLOSS_WORD Vector exp2(Vector t) {
  if (t.value != t.value) return t;
  float clamped = t.value < -127.f ? -127.f : t.value, whole = std::floor(clamped), f = clamped - whole;
  if (whole >= 128.f) return {kInfinity};
  float p = kExp2[6];
  for (int i = 5; i >= 0; --i) p = p * f + kExp2[i];
  uint32_t bits = uint32_t(int(whole) + 127) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return {p * power};
}
FASTLOSS_WORD Vector tanh(Vector x) { return {std::tanh(x.value)}; }
FASTLOSS_WORD Vector log1p(Vector x) { return {std::log1p(x.value)}; }
FASTLOSS_WORD Vector log_near_one(Vector t, Vector x) {
  return {std::fabs(x.value) < 0.25f ? std::log1p(x.value) : std::log(t.value)};
}
FASTLOSS_WORD Vector absolute(Vector a) { return {std::fabs(a.value)}; }
#undef FASTLOSS_WORD
} // namespace scalar

#ifdef __x86_64__

namespace avx2 {
#define FASTLOSS_WORD static inline __attribute__((target("avx2,fma,f16c"), always_inline))
typedef __m256 Vector;
constexpr int kWidth = 8;
FASTLOSS_WORD Vector set(float a) { return _mm256_set1_ps(a); }
FASTLOSS_WORD Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
FASTLOSS_WORD Vector subtract(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
FASTLOSS_WORD Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
FASTLOSS_WORD Vector divide(Vector a, Vector b) { return _mm256_div_ps(a, b); }
FASTLOSS_WORD Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
FASTLOSS_WORD Vector scaled(Vector z, Vector c, Vector k) { return _mm256_fmsub_ps(z, c, k); }
FASTLOSS_WORD Vector maximum(Vector a, Vector b) { return _mm256_max_ps(a, b); }
FASTLOSS_WORD Vector where_less(Vector a, Vector b, Vector yes, Vector no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
FASTLOSS_WORD unsigned lanes_above(Vector a, Vector b) {
  return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)));
}
FASTLOSS_WORD float sum(Vector a) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
FASTLOSS_WORD float largest(Vector a) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
FASTLOSS_WORD __m128i round_to_half(Vector a) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }
FASTLOSS_WORD __m128i round_to_bfloat(Vector a) {
  __m256i bits = _mm256_castps_si256(a), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i high = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  high = _mm256_blendv_epi8(high, _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
FASTLOSS_WORD Vector load(const float *p) { return _mm256_loadu_ps(p); }
FASTLOSS_WORD Vector load(const Float16 *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
FASTLOSS_WORD Vector load(const BFloat16 *p) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
FASTLOSS_WORD Vector load(const uint8_t *p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
FASTLOSS_WORD void store(float *p, Vector a) { _mm256_storeu_ps(p, a); }
FASTLOSS_WORD void store(Float16 *p, Vector a) { _mm_storeu_si128((__m128i *)p, round_to_half(a)); }
FASTLOSS_WORD void store(BFloat16 *p, Vector a) { _mm_storeu_si128((__m128i *)p, round_to_bfloat(a)); }
FASTLOSS_WORD void stream_pair(float *p, Vector a, Vector b) {
  _mm256_stream_ps(p, a);
  _mm256_stream_ps(p + 8, b);
}
FASTLOSS_WORD void stream_pair(Float16 *p, Vector a, Vector b) {
  _mm256_stream_si256((__m256i *)p, _mm256_set_m128i(round_to_half(b), round_to_half(a)));
}
FASTLOSS_WORD void stream_pair(BFloat16 *p, Vector a, Vector b) {
  _mm256_stream_si256((__m256i *)p, _mm256_set_m128i(round_to_bfloat(b), round_to_bfloat(a)));
}
template <class T> FASTLOSS_WORD Vector load_part(const T *p, int64_t count, float fill) {
  float lanes[8];
  for (int i = 0; i < 8; ++i) lanes[i] = i < count ? to_float(p[i]) : fill;
  return load(lanes);
}
template <class T> FASTLOSS_WORD void store_part(T *p, Vector a, int64_t count) {
  float lanes[8];
  store(lanes, a);
  for (int i = 0; i < count; ++i) from_float(p[i], lanes[i]);
}
// Clamped at -127, whose exponent field is 0: everything below, -inf too, becomes exactly 0.
FASTLOSS_WORD Vector exp2(Vector t) {
  Vector clamped = _mm256_min_ps(set(128.f), _mm256_max_ps(set(-127.f), t));
  Vector whole = _mm256_floor_ps(clamped), f = subtract(clamped, whole), p = set(kExp2[6]);
  for (int i = 5; i >= 0; --i) p = multiply_add(p, f, set(kExp2[i]));
  __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
  Vector power = _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  return _mm256_blendv_ps(multiply(p, power), t, _mm256_cmp_ps(t, t, _CMP_UNORD_Q));
}
FASTLOSS_WORD Vector tanh(Vector x) {
  Vector zero = set(0.f), size = maximum(x, subtract(zero, x)), square = multiply(x, x), p = set(kTanh[4]);
  for (int i = 3; i >= 0; --i) p = multiply_add(p, square, set(kTanh[i]));
  Vector small = multiply_add(multiply(x, square), p, x);
  Vector power = exp2(multiply(size, set(2 * kLog2e)));
  Vector large = subtract(set(1.f), divide(set(2.f), add(power, set(1.f))));
  large = where_less(x, zero, subtract(zero, large), large);
  return where_less(size, set(kTanhSmall), small, large);
}
FASTLOSS_WORD Vector absolute(Vector a) { return _mm256_andnot_ps(set(-0.f), a); }
FASTLOSS_WORD Vector log_near_one(Vector t, Vector x) {
  __m256i bits = _mm256_castps_si256(t);
  __m256i whole = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(kHalfRoot)), 23);
  Vector part = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(whole, 23)));
  Vector exponent = _mm256_cvtepi32_ps(whole), near_one = _mm256_cmp_ps(exponent, set(0.f), _CMP_EQ_OQ);
  Vector f = _mm256_blendv_ps(subtract(part, set(1.f)), x, near_one), p = set(kLog1p[7]); // x has the digits 1 + x lost
  for (int i = 6; i >= 0; --i) p = multiply_add(p, f, set(kLog1p[i]));
  p = multiply_add(multiply_add(p, f, set(-0.5f)), multiply(f, f), f);
  p = multiply_add(exponent, set(kLn2Float), p);
  return _mm256_blendv_ps(p, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
FASTLOSS_WORD Vector log1p(Vector x) { return log_near_one(add(set(1.f), x), x); }
#undef FASTLOSS_WORD
} // namespace avx2

// What both AVX-512 levels share: everything but the rounding to bf16.
namespace avx512_common {
#define FASTLOSS_WORD static inline __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"), always_inline))
typedef __m512 Vector;
constexpr int kWidth = 16;
FASTLOSS_WORD Vector set(float a) { return _mm512_set1_ps(a); }
FASTLOSS_WORD Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
FASTLOSS_WORD Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
FASTLOSS_WORD Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
FASTLOSS_WORD Vector divide(Vector a, Vector b) { return _mm512_div_ps(a, b); }
FASTLOSS_WORD Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
FASTLOSS_WORD Vector scaled(Vector z, Vector c, Vector k) { return _mm512_fmsub_ps(z, c, k); }
FASTLOSS_WORD Vector maximum(Vector a, Vector b) { return _mm512_max_ps(a, b); }
FASTLOSS_WORD Vector where_less(Vector a, Vector b, Vector yes, Vector no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
FASTLOSS_WORD unsigned lanes_above(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
FASTLOSS_WORD float sum(Vector a) { return _mm512_reduce_add_ps(a); }
FASTLOSS_WORD float largest(Vector a) { return _mm512_reduce_max_ps(a); }
FASTLOSS_WORD __mmask16 first(int64_t count) { return __mmask16((1u << count) - 1); }
FASTLOSS_WORD Vector widen(__m256i bfloat) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloat), 16));
}
FASTLOSS_WORD __m256i round_to_half(Vector a) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }
FASTLOSS_WORD Vector load(const float *p) { return _mm512_loadu_ps(p); }
FASTLOSS_WORD Vector load(const Float16 *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
FASTLOSS_WORD Vector load(const BFloat16 *p) { return widen(_mm256_loadu_si256((const __m256i *)p)); }
FASTLOSS_WORD Vector load(const uint8_t *p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
FASTLOSS_WORD Vector load_part(const float *p, int64_t count, float fill) {
  return _mm512_mask_loadu_ps(set(fill), first(count), p);
}
FASTLOSS_WORD Vector load_part(const Float16 *p, int64_t count, float fill) {
  return _mm512_mask_cvtph_ps(set(fill), first(count), _mm256_maskz_loadu_epi16(first(count), p));
}
FASTLOSS_WORD Vector load_part(const BFloat16 *p, int64_t count, float fill) {
  return _mm512_mask_mov_ps(set(fill), first(count), widen(_mm256_maskz_loadu_epi16(first(count), p)));
}
FASTLOSS_WORD Vector load_part(const uint8_t *p, int64_t count, float fill) {
  Vector bytes = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(count), p)));
  return _mm512_mask_mov_ps(set(fill), first(count), bytes);
}
FASTLOSS_WORD void store(float *p, Vector a) { _mm512_storeu_ps(p, a); }
FASTLOSS_WORD void store(Float16 *p, Vector a) { _mm256_storeu_si256((__m256i *)p, round_to_half(a)); }
FASTLOSS_WORD void store_part(float *p, Vector a, int64_t count) { _mm512_mask_storeu_ps(p, first(count), a); }
FASTLOSS_WORD void store_part(Float16 *p, Vector a, int64_t count) {
  _mm256_mask_storeu_epi16(p, first(count), round_to_half(a));
}
FASTLOSS_WORD void stream_pair(float *p, Vector a, Vector b) {
  _mm512_stream_ps(p, a);
  _mm512_stream_ps(p + 16, b);
}
FASTLOSS_WORD void stream_pair(Float16 *p, Vector a, Vector b) {
  __m512i low = _mm512_castsi256_si512(round_to_half(a));
  _mm512_stream_si512((__m512i *)p, _mm512_inserti64x4(low, round_to_half(b), 1));
}
// scalef multiplies by 2^floor(t) and takes care of the infinities, NaN and underflow by itself.
FASTLOSS_WORD Vector exp2(Vector t) {
  Vector f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF), p = set(kExp2[6]);
  for (int i = 5; i >= 0; --i) p = multiply_add(p, f, set(kExp2[i]));
  return _mm512_scalef_ps(p, t);
}
FASTLOSS_WORD Vector tanh(Vector x) {
  Vector zero = set(0.f), size = maximum(x, subtract(zero, x)), square = multiply(x, x), p = set(kTanh[4]);
  for (int i = 3; i >= 0; --i) p = multiply_add(p, square, set(kTanh[i]));
  Vector small = multiply_add(multiply(x, square), p, x);
  Vector power = exp2(multiply(size, set(2 * kLog2e)));
  Vector large = subtract(set(1.f), divide(set(2.f), add(power, set(1.f))));
  large = where_less(x, zero, subtract(zero, large), large);
  return where_less(size, set(kTanhSmall), small, large);
}
FASTLOSS_WORD Vector absolute(Vector a) { return _mm512_abs_ps(a); }
FASTLOSS_WORD Vector log_near_one(Vector t, Vector x) {
  __m512i bits = _mm512_castps_si512(t);
  __m512i whole = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(kHalfRoot)), 23);
  Vector part = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(whole, 23)));
  __mmask16 near_one = _mm512_testn_epi32_mask(whole, whole);
  Vector f = _mm512_mask_mov_ps(subtract(part, set(1.f)), near_one, x); // x has the digits that 1 + x has lost
  Vector p = set(kLog1p[7]);
  for (int i = 6; i >= 0; --i) p = multiply_add(p, f, set(kLog1p[i]));
  p = multiply_add(multiply_add(p, f, set(-0.5f)), multiply(f, f), f);
  p = multiply_add(_mm512_cvtepi32_ps(whole), set(kLn2Float), p);
  return _mm512_mask_mov_ps(p, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);
}
FASTLOSS_WORD Vector log1p(Vector x) { return log_near_one(add(set(1.f), x), x); }
#undef FASTLOSS_WORD
} // namespace avx512_common

namespace avx512 {
using namespace avx512_common;
using avx512_common::store, avx512_common::store_part, avx512_common::stream_pair;
#define FASTLOSS_WORD static inline __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"), always_inline))
FASTLOSS_WORD __m256i round_to_bfloat(Vector a) {
  __m512i bits = _mm512_castps_si512(a), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i high = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(high, nan, _mm512_set1_epi32(0x7fc0)));
}
FASTLOSS_WORD void store(BFloat16 *p, Vector a) { _mm256_storeu_si256((__m256i *)p, round_to_bfloat(a)); }
FASTLOSS_WORD void store_part(BFloat16 *p, Vector a, int64_t count) {
  _mm256_mask_storeu_epi16(p, first(count), round_to_bfloat(a));
}
FASTLOSS_WORD void stream_pair(BFloat16 *p, Vector a, Vector b) {
  __m512i low = _mm512_castsi256_si512(round_to_bfloat(a));
  _mm512_stream_si512((__m512i *)p, _mm512_inserti64x4(low, round_to_bfloat(b), 1));
}
#undef FASTLOSS_WORD
} // namespace avx512

namespace avx512bf16 {
using namespace avx512_common;
using avx512_common::store, avx512_common::store_part, avx512_common::stream_pair;
#define FASTLOSS_WORD                                                                                                  \
  static inline __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"), always_inline))
FASTLOSS_WORD void store(BFloat16 *p, Vector a) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(a)); }
FASTLOSS_WORD void store_part(BFloat16 *p, Vector a, int64_t count) {
  _mm256_mask_storeu_epi16(p, first(count), (__m256i)_mm512_cvtneps_pbh(a));
}
FASTLOSS_WORD void stream_pair(BFloat16 *p, Vector a, Vector b) {
  _mm512_stream_si512((__m512i *)p, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}
#undef FASTLOSS_WORD
} // namespace avx512bf16

#endif

} // namespace fastloss
