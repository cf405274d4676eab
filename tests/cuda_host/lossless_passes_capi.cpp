// Each pass of the lossless encoders by itself, with the arguments of csrc/bindings_lossless_cuda.cpp: for a test of
// the glue. The other calls are those of lossless_capi.cpp.
#include "lossless_capi.cpp"

extern "C" {
const char *c_p7_pass(bool second, const void *numbers, int64_t numel, int number, const uint8_t *table,
                      uint8_t *codes_of, uint8_t *codes, uint8_t *const *bytes, uint8_t *bits, int64_t *escapes,
                      const int64_t *offsets, uint16_t *positions, void *values) {
  const CudaP7Encode p{numbers, numel,    number,    nullptr,
                       table,   codes_of, codes,     {{bytes[0], bytes[1], bytes[2]}, bits},
                       escapes, offsets,  positions, values};
  return guard([&] { (second ? p7_escapes_launch : p7_encode_launch)(p, nullptr); });
}
const char *c_r8_pass(bool second, const uint8_t *plane, int64_t numel, const uint8_t *frequencies, uint8_t *scratch,
                      int64_t *lengths, int *literals, const int64_t *offsets, uint8_t *data) {
  const CudaR8Encode p{plane, numel, frequencies, scratch, lengths, literals, offsets, data};
  return guard([&] { (second ? r8_move_launch : r8_encode_launch)(p, nullptr); });
}
}
