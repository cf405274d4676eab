// What the bit kernels share; the names are those of python/fastloss/quant/contract.py. docs/design.md, "The bit
// contract", says what each number is.
#pragma once
#include <cstdint>

namespace fastloss {

constexpr int64_t kRowBytes = 64; // rows of bits are padded to this
constexpr int kMostPlanes = 4;

enum PackKind : int { kPackSign = 0, kPackTernary = 1, kPackCodes = 2 };
enum Surrogate : int { kIdentity = 0, kClip = 1, kApprox = 2, kReste = 3, kBiper = 4, kSwish = 5, kFda = 6 };
enum Save : int { kSaveDense = 1, kSaveSigns = 2, kSaveMask = 4, kSaveCodes = 8 };
enum Grad : int { kGradX = 1, kGradScale = 2, kGradShift = 4 };
enum Activation : int { kNoActivation = 0, kRelu = 1, kHardtanh = 2, kSilu = 3 };

// Bytes of a row of `columns` bits.
inline int64_t row_bytes(int64_t columns) { return (columns + 8 * kRowBytes - 1) / (8 * kRowBytes) * kRowBytes; }

// `count` planes of `rows` x `row_bytes` bits without gaps: the value of column k of a row is offset + sum over the
// planes p of weights[p] bit(p, k). Bits beyond the last column are 0.
struct Planes {
  const uint8_t *bits;      // [count][rows][row_bytes(columns)]
  const int32_t *popcounts; // [count][rows], or null where an op does not ask for them
  int64_t rows, columns;
  int count;
  int weights[kMostPlanes];
  int offset;
};

} // namespace fastloss
