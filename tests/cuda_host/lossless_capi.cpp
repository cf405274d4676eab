// C functions over the launchers of the lossless kernels, for ctypes: an error comes back as text.
#include "lossless_codecs.h"

#include <exception>
#include <string>

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
  return guard([&] { p7_decode_launch({compressed_at(blob, plan), first, count, out}, nullptr); });
}
const char *c_lossless_rows(const uint8_t *blob, const int64_t *plan, const void *index, bool wide, int64_t count,
                            void *out) {
  return guard([&] { p7_rows_launch({compressed_at(blob, plan), index, wide, count, out}, nullptr); });
}
}
