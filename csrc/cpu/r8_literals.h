// The escaped bytes of R8's streams, which lie behind the others in reverse.
#pragma once
#include "r8_decode.h"

namespace fastloss {
namespace {

// The escaped bytes of a step, `lanes` a mask.
inline void read_literals(RansStream &stream, uint64_t lanes, uint8_t *out) {
  for (; lanes; lanes &= lanes - 1) {
    if (stream.literal > stream.begin) --stream.literal;
    out[__builtin_ctzll(lanes)] = *stream.literal;
  }
}

} // namespace
} // namespace fastloss
