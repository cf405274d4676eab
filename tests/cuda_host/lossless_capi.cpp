// C functions over the launchers of the lossless kernels, for ctypes: an error comes back as text.
#include "lossless_codecs.h"

#include <exception>
#include <string>
#include <vector>

namespace {
template <class F> const char *guard(F f) {
  static std::string text;
  try {
    f();
    return nullptr;
  } catch (const std::exception &e) {
    text = e.what();
    return text.c_str();
  }
}
} // namespace

const fastloss::DeviceLimits &fastloss::device_limits(int) {
  static const DeviceLimits h200{132, 8, 227 << 10, 228 << 10, 90};
  return h200;
}

using namespace fastloss;

extern "C" {
const char *c_lossless_decode(const uint8_t *blob, const int64_t *plan, int64_t first, int64_t count, void *out) {
  const Compressed c = compressed_at(blob, plan);
  return guard([&] { (c.codec == kP7 ? p7_decode_launch : r8_decode_launch)({c, first, count, out}, nullptr); });
}
const char *c_lossless_rows(const uint8_t *blob, const int64_t *plan, const void *index, bool wide, int64_t count,
                            void *out) {
  const Compressed c = compressed_at(blob, plan);
  return guard([&] { (c.codec == kP7 ? p7_rows_launch : r8_rows_launch)({c, index, wide, count, out}, nullptr); });
}
const char *c_crc32c(const uint8_t *data, int64_t size, int64_t block, int64_t *out) {
  std::vector<uint32_t> pieces(size_t(crc32c_pieces(size, block)));
  return guard([&] { crc32c_launch({data, size, block, pieces.data(), out}, nullptr); });
}
const char *c_p7_histogram(const void *numbers, int64_t numel, int number, unsigned long long *counts, int blocks) {
  CudaP7Encode p{};
  p.numbers = numbers, p.numel = numel, p.number = number, p.counts = counts;
  return guard([&] { p7_histogram_launch(p, blocks, nullptr); });
}
// positions and values have room for every pair.
const char *c_p7_encode(const void *numbers, int64_t numel, int number, const uint8_t *table, uint8_t *codes,
                        uint8_t *const *bytes, uint8_t *bits, int64_t *offsets, uint16_t *positions, void *values) {
  std::vector<uint8_t> codes_of(65536);
  const CudaP7Encode p{numbers,     numel,           number,    nullptr,
                       table,       codes_of.data(), codes,     {{bytes[0], bytes[1], bytes[2]}, bits},
                       offsets + 1, offsets,         positions, values};
  return guard([&] {
    p7_encode_launch(p, nullptr);
    offsets[0] = 0;
    for (int64_t b = 0; b < lossless_blocks(numel); ++b) offsets[b + 1] += offsets[b];
    p7_escapes_launch(p, nullptr);
  });
}
const char *c_byte_split(const void *numbers, int64_t numel, int number, uint8_t *field, uint8_t *const *bytes,
                         uint8_t *bits) {
  return guard(
      [&] { byte_split_launch({numbers, numel, number, field, {{bytes[0], bytes[1], bytes[2]}, bits}}, nullptr); });
}
const char *c_byte_histogram(const uint8_t *plane, int64_t numel, unsigned long long *counts, int blocks) {
  return guard([&] { byte_histogram_launch(plane, numel, counts, blocks, nullptr); });
}
// data has room for the longest payload of every block.
const char *c_r8_encode(const uint8_t *plane, int64_t numel, const uint8_t *frequencies, int64_t *offsets,
                        uint8_t *data) {
  const int64_t blocks = lossless_blocks(numel);
  std::vector<uint8_t> scratch(size_t(blocks * kR8Scratch));
  std::vector<int> literals{};
  literals.resize(size_t(blocks));
  const CudaR8Encode p{plane, numel, frequencies, scratch.data(), offsets + 1, literals.data(), offsets, data};
  return guard([&] {
    r8_encode_launch(p, nullptr);
    offsets[0] = 0;
    for (int64_t b = 0; b < blocks; ++b) offsets[b + 1] += offsets[b];
    r8_move_launch(p, nullptr);
  });
}
}
