// A C function over the launcher of dfloat11_decode, for ctypes: an error comes back as text.
#include "dfloat11_decode.h"

#include <exception>
#include <string>

const fastloss::DeviceLimits &fastloss::device_limits(int) {
  static const DeviceLimits h200{132, 8, 227 << 10, 228 << 10, 90};
  return h200;
}

extern "C" const char *c_dfloat11(const fastloss::CudaDfloat11 *p, int multiprocessors) {
  static std::string text;
  try {
    fastloss::dfloat11_decode_launch(*p, multiprocessors, nullptr);
    return nullptr;
  } catch (const std::exception &e) {
    text = e.what();
    return text.c_str();
  }
}
