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
}
