// A block is one run of Huffman codes, several of them read at once by a table of the next 11 bits.
#include "dfloat11_decode.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <omp.h>

namespace fastloss {
namespace {

constexpr int kWindow = 11, kMostAtOnce = 4, kLongest = 32;
constexpr int64_t kPiece = 4096; // exponents that wait in the first-level cache for their signs and mantissas

// The codes that lie wholly within a window of bits; none: its first code is longer, or no code.
struct Run {
  uint8_t exponents[kMostAtOnce], codes, bits;
};

struct Code {
  uint8_t exponent;
  int bits; // 0: no code
};

// The code at the front of 32 bits, by the tables of the format.
Code code_at(const Dfloat11 &args, uint32_t bits) {
  int value = args.luts[bits >> 24];
  for (int byte = 1; byte < 4 && value >= 240 && 256 - value < args.tables; ++byte)
    value = args.luts[256 * (256 - value) + (bits >> (24 - 8 * byte) & 255)];
  const int length = args.luts[256 * args.tables + value];
  return {uint8_t(value), length <= kLongest ? length : 0};
}

void fill_runs(const Dfloat11 &args, Run *runs) {
  for (uint32_t window = 0; window < 1u << kWindow; ++window) {
    Run run = {};
    while (run.codes < kMostAtOnce && run.bits < kWindow) {
      // Bits beyond the window are unknown, and a code is right if they make no difference. That it fits is not enough:
      // what no code of the text has (its end has one) encoders fill with the entry before, which may be shorter.
      const uint32_t zeros = window << (32 - kWindow) << run.bits,
                     ones = zeros | ((1u << (32 - kWindow + run.bits)) - 1);
      const Code code = code_at(args, zeros);
      if (code.bits == 0 || run.bits + code.bits > kWindow || code_at(args, ones).exponent != code.exponent) break;
      run.exponents[run.codes++] = code.exponent;
      run.bits = uint8_t(run.bits + code.bits);
    }
    runs[window] = run;
  }
}

// Bits of the codes, the most significant first, zeros beyond the end.
struct Bits {
  const uint8_t *codes;
  int64_t bytes;

  // At least 57 bits from bit `at` on, at the top.
  uint64_t from(int64_t at) const {
    const int64_t byte = at >> 3;
    uint64_t word = 0;
    if (byte + 8 <= bytes) std::memcpy(&word, codes + byte, 8);
    else if (byte < bytes) std::memcpy(&word, codes + byte, size_t(bytes - byte));
    return __builtin_bswap64(word) << (at & 7);
  }
};

int64_t first_bit(const Dfloat11 &args, int64_t block) {
  const int64_t thread = block * args.threads_per_block, at = 5 * thread;
  const int64_t bytes = (5 * args.blocks * args.threads_per_block + 7) / 8, byte = at / 8;
  const int pair = args.gaps[byte] << 8 | (byte + 1 < bytes ? args.gaps[byte + 1] : 0);
  return thread * args.bytes_per_thread * 8 + (pair >> (11 - at % 8) & 31);
}

// `count` exponents from bit `at` on; the bit behind them, or -1 where there is no code. The room behind `exponents`
// is kMostAtOnce bytes more.
int64_t read_exponents(const Dfloat11 &args, const Run *runs, int64_t at, int64_t count, uint8_t *exponents) {
  const Bits bits = {args.codes, args.code_bytes};
  const int64_t end = 8 * args.code_bytes;
  int64_t done = 0;
  while (done < count) {
    if (at >= end) return -1;
    uint64_t word = bits.from(at);
    int left = 57;
    while (done < count && left >= kWindow) {
      const Run &run = runs[word >> (64 - kWindow)];
      int used = run.bits;
      if (run.codes && done + run.codes <= count) {
        std::memcpy(exponents + done, run.exponents, kMostAtOnce);
        done += run.codes;
      } else {
        if (left < kLongest) break;
        const Code code = code_at(args, uint32_t(word >> 32));
        if (code.bits == 0) return -1;
        exponents[done++] = code.exponent;
        used = code.bits;
      }
      word <<= used, left -= used, at += used;
    }
  }
  return at;
}

void merge(const uint8_t *exponents, const uint8_t *sign_mantissa, int64_t count, uint16_t *out) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = uint16_t((sign_mantissa[i] & 0x80) << 8 | exponents[i] << 7 | (sign_mantissa[i] & 0x7f));
}

// Whether the block's codes are whole and end where they should; where they are not, its other numbers are zero bits.
bool decode_block(const Dfloat11 &args, const Run *runs, int64_t block) {
  uint8_t exponents[kPiece + kMostAtOnce];
  int64_t at = first_bit(args, block);
  const int64_t last = args.positions[block + 1];
  if (args.positions[block] == last)
    return block > 0 && block == args.blocks - 1; // nothing but the last byte's padding
  if (block == 0 && at != 0) return false;
  for (int64_t first = args.positions[block]; first < last; first += kPiece) {
    const int64_t count = std::min(kPiece, last - first);
    at = read_exponents(args, runs, at, count, exponents);
    if (at < 0) {
      std::memset(args.out + first, 0, size_t(last - first) * sizeof *args.out);
      return false;
    }
    merge(exponents, args.sign_mantissa + first, count, args.out + first);
  }
  const int64_t rest = 8 * args.code_bytes - at;
  return last == args.numel ? rest >= 0 && rest < 8 : at == first_bit(args, block + 1);
}

} // namespace

int64_t dfloat11_decode_cpu(const Dfloat11 &args) {
  const std::unique_ptr<Run[]> runs(new Run[1 << kWindow]);
  fill_runs(args, runs.get());
  std::atomic<int64_t> bad(args.blocks);
  const int threads = int(std::max<int64_t>(1, std::min<int64_t>(omp_get_max_threads(), args.blocks / 4)));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < args.blocks; ++block)
    if (!decode_block(args, runs.get(), block))
      for (int64_t before = bad; block < before && !bad.compare_exchange_weak(before, block);) {
      }
  return bad < args.blocks ? bad.load() : -1;
}

} // namespace fastloss
