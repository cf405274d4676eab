// Hostile compressed tensors: of any bytes, a plan that contract.check_plan would pass and sections of any content,
// decoded on every instruction set from a blob and to an output that end where AddressSanitizer sees them end. All
// instruction sets must agree. Built with -fsanitize=fuzzer the entry is LLVMFuzzerTestOneInput; without, `main` makes
// the bytes up: fuzz_lossless [seconds] [executions] [seed].
#include "cpu/cpu.h"
#include "cpu/crc32c.h"
#include "cpu/lossless_decode.h"
#include "lossless.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace fastloss { // of csrc/cpu/row_stats.cpp, which is not linked
int best_isa() {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
  return __builtin_cpu_supports("avx2") ? kAvx2 : kScalar;
}
const char *isa_name(int) { return "fuzzed"; }
} // namespace fastloss

using namespace fastloss;

namespace {

// The input byte by byte, then numbers made of it.
class Bytes {
public:
  Bytes(const uint8_t *data, size_t size) : data_(data), size_(size) {
    for (size_t i = 0; i < size; ++i) state_ = (state_ ^ data[i]) * 0x100000001b3u;
  }
  uint8_t next() { return at_ < size_ ? data_[at_++] : uint8_t(random()); }
  int64_t below(int64_t end) { // 4 bytes are enough
    uint32_t value = 0;
    for (int i = 0; i < 4; ++i) value = value << 8 | next();
    return end > 0 ? value % end : 0;
  }

private:
  const uint8_t *data_;
  size_t size_, at_ = 0;
  uint64_t state_ = 0xcbf29ce484222325u;
  uint64_t random() {
    state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
    return state_ >> 24;
  }
};

int64_t sizes_of(Bytes &in) {
  const int64_t near[] = {
      0,     1,     2,     63,    64,    65,    127,    128,    129,    4095,   4096,   4097,
      16383, 16384, 16385, 32768, 65535, 65537, 131071, 131072, 131073, 150000, 1100000}; // eight blocks at once, and
                                                                                          // past the cache
  return in.next() & 1 ? near[in.below(int64_t(std::size(near)))] : in.below(90000);
}

struct Problem {
  std::vector<int64_t> plan = std::vector<int64_t>(size_t(kPlanHead + 2 * kSections));
  int64_t end = 0;
  int item = 1;
  Bytes &in;

  explicit Problem(Bytes &in) : in(in) {
    int codec = int(in.below(3)), number = int(in.below(5)), layout = 0;
    if (codec == kP7) number %= 3;
    if (codec == kRaw && in.next() & 1) number = kOpaque;
    item = number == kOpaque ? 1 << in.below(5) : kSplits[number].bytes;
    int64_t numel = sizes_of(in), columns = std::max<int64_t>(1, in.below(3) ? in.below(700) : in.below(40000));
    if (!numel) codec = kRaw;
    if (codec == kP7 && in.below(4) == 0) {
      layout = kLayoutTiles, columns = 128 * (1 + in.below(9));
      numel = std::max<int64_t>(1, numel / (16 * columns)) * 16 * columns;
    } else if (numel % columns || !numel) {
      numel = numel / columns * columns;
      if (!numel) columns = numel = codec == kRaw ? 0 : 1;
    }
    const int64_t head[] = {codec, number, layout, numel, columns ? numel / columns : 0, columns};
    std::copy(std::begin(head), std::end(head), plan.begin());
    if (numel) sections(codec, number, numel);
  }

  void add(int kind, int64_t bytes) {
    if (!bytes) return;
    plan[size_t(kPlanHead + 2 * kind)] = end, plan[size_t(kPlanHead + 2 * kind + 1)] = bytes;
    end = (end + bytes + 63) / 64 * 64;
  }

  void sections(int codec, int number, int64_t numel) {
    const int64_t blocks = lossless_blocks(numel), padded = lossless_padded(numel);
    if (codec == kRaw) {
      add(kRawBytes, numel * item);
    } else {
      const Split split = kSplits[number];
      if (codec == kP7) {
        const int64_t escapes = in.below(4) ? in.below(5000) : 0;
        add(kTable, 256), add(kCodes, padded / 128 * 56), add(kEscapeOffsets, 8 * (blocks + 1));
        add(kEscapePositions, 2 * escapes), add(kEscapeValues, 2 * escapes * item);
      }
      int form[3] = {}; // of a byte plane: zero, raw, coded
      for (int p = 0; p < split.byte_planes; ++p) form[p] = int(in.below(codec == kR8 ? 3 : 2));
      for (int p = 0; p < split.byte_planes; ++p)
        if (form[p] == 1) add(kBytes0 + p, padded);
      add(kBits, padded / 8 * split.bit_planes);
      for (int p = 0; codec == kR8 && p <= split.byte_planes; ++p)
        if (!p || form[p - 1] == 2) {
          const int kind = kFieldFrequencies + 3 * p;
          add(kind, 256), add(kind + 1, 8 * (blocks + 1)), add(kind + 2, 1 + in.below(in.next() & 1 ? 200 : 2 * numel));
        }
    }
    add(kBlockCrc, 4 * blocks);
  }

  // Offsets that rise through 0..total, or any.
  void offsets(uint8_t *at, int64_t bytes, int64_t total) {
    const bool rising = in.below(8) != 0;
    std::vector<uint64_t> values(size_t(bytes / 8));
    for (uint64_t &value : values) value = uint64_t(in.below(total + 1));
    if (rising) std::sort(values.begin(), values.end());
    else
      for (uint64_t &value : values) value = in.below(3) ? value : value * 0x9e3779b97f4a7c15u;
    memcpy(at, values.data(), size_t(bytes));
  }

  void fill(uint8_t *blob) {
    for (int64_t i = 0; i < end; ++i) blob[i] = in.next();
    const auto at = [&](int kind) { return blob + plan[size_t(kPlanHead + 2 * kind)]; };
    const auto bytes = [&](int kind) { return plan[size_t(kPlanHead + 2 * kind + 1)]; };
    if (bytes(kEscapeOffsets)) offsets(at(kEscapeOffsets), bytes(kEscapeOffsets), bytes(kEscapePositions) / 2);
    for (int kind = kFieldFrequencies; kind < kRawBytes; kind += 3) {
      if (!bytes(kind)) continue;
      offsets(at(kind + 1), bytes(kind + 1), bytes(kind + 2));
      if (in.below(8) == 0) continue; // frequencies that share more than 256 slots
      const int64_t used = 1 + in.below(255);
      std::fill(at(kind), at(kind) + 256, uint8_t(0));
      for (int64_t i = 0; i < used; ++i) ++at(kind)[in.next() & (in.below(2) ? 255 : 7)];
    }
  }
};

// Memory of an exact size: what lies behind it is poisoned.
std::unique_ptr<uint8_t[]> exactly(int64_t bytes) { return std::unique_ptr<uint8_t[]>(new uint8_t[size_t(bytes)]()); }

void same(const uint8_t *a, const uint8_t *b, int64_t bytes, const char *what, int isa) {
  if (!bytes || !memcmp(a, b, size_t(bytes))) return;
  fprintf(stderr, "%s differs on isa %d from scalar code\n", what, isa);
  abort();
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  Bytes in(data, size);
  Problem problem(in);
  const auto blob = exactly(problem.end + 64);
  problem.fill(blob.get());
  const Compressed c = compressed_at(blob.get(), problem.plan.data());
  const int item = problem.item;
  const int64_t unit = c.layout == kLayoutTiles ? 16 * c.columns : 1;
  const int64_t first = in.below(c.numel / unit + 1) * unit, count = in.below((c.numel - first) / unit + 1) * unit;
  const bool rows = c.layout == kLayoutRows && c.rows > 0;
  std::vector<int64_t> index(size_t(rows ? in.below(20) : 0));
  for (int64_t &row : index) row = in.below(c.rows);
  const int64_t part = count * item, all = c.numel * item, few = int64_t(index.size()) * c.columns * item;
  const auto want_part = exactly(part), want_all = exactly(all), want_few = exactly(few);
  int64_t bad = 0;
  for (int isa = 0; isa <= best_isa(); ++isa) {
    const auto got_part = exactly(part), got_all = exactly(all), got_few = exactly(few);
    lossless_decode_cpu(c, item, first, count, isa ? got_part.get() : want_part.get(), isa);
    const int64_t found = lossless_decode_checked_cpu(c, item, isa ? got_all.get() : want_all.get(), isa);
    if (!isa) bad = found;
    if (lossless_decode_checked_cpu(c, item, nullptr, isa) != found) abort();
    if (rows)
      lossless_rows_cpu(c, item, index.data(), int64_t(index.size()), isa ? got_few.get() : want_few.get(), isa);
    if (!isa) continue;
    same(want_part.get(), got_part.get(), part, "a range", isa), same(want_all.get(), got_all.get(), all, "all", isa);
    same(want_few.get(), got_few.get(), few, "rows", isa);
    same(reinterpret_cast<uint8_t *>(&bad), reinterpret_cast<const uint8_t *>(&found), sizeof bad, "the bad block",
         isa);
  }
  same(want_part.get(), want_all.get() + first * item, part, "a part", 0);
  return 0;
}

#ifndef FASTLOSS_LIBFUZZER
int main(int argc, char **argv) {
  const double seconds = argc > 1 ? atof(argv[1]) : 10;
  const long most = argc > 2 ? atol(argv[2]) : 1L << 60;
  uint64_t state = argc > 3 ? strtoull(argv[3], nullptr, 10) * 2654435761u + 1 : 88172645463325252u;
  const auto start = std::chrono::steady_clock::now();
  const auto spent = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  uint8_t input[64];
  long runs = 0;
  for (; runs < most && spent() < seconds; ++runs) {
    for (uint8_t &byte : input) {
      state ^= state << 13, state ^= state >> 7, state ^= state << 17;
      byte = uint8_t(state >> 32);
    }
    LLVMFuzzerTestOneInput(input, sizeof input);
    if (runs % 10000 == 9999)
      printf("%ld executions, %.1f a second\n", runs + 1, double(runs + 1) / spent()), fflush(stdout);
  }
  printf("%ld executions in %.1f s: clean\n", runs, spent());
}
#endif
