// docs/design.md, "The lossless contract": P7's histogram and encoder. A block is split, then its codes are looked up,
// then what escaped is taken out of the planes; all of it in the first-level cache.
#include "p7_encode.h"
#include "block_planes.h"
#include "p7_codes.h"

#include <memory>

namespace fastloss {
namespace {

constexpr int kGroups = int(kLosslessBlock / kLosslessGroup);

constexpr int kAllPairs = 1 << 16;

// In several tables: equal pairs in a row would wait for one another's counts. For a few blocks that does not pay.
// Tables lie so that the few counts that matter, 1 KiB apart in each, do not share the same sets of the first-level
// cache.
class PairCounts {
public:
  explicit PairCounts(bool several) : step_(several ? kAllPairs + 64 : 0), counts_(size_t(kAllPairs + 3 * step_), 0) {}

  // `ahead`: `bytes` bytes a number that are asked for on the way.
  void count(const uint8_t *fields, int64_t pairs, const uint8_t *ahead, int64_t bytes) {
    uint32_t *t0 = counts_.data(), *t1 = t0 + step_, *t2 = t1 + step_, *t3 = t2 + step_;
    int64_t i = 0;
    for (; i + 4 <= pairs; i += 4) {
      uint64_t four;
      memcpy(&four, fields + 2 * i, 8);
      __builtin_prefetch(ahead + 2 * i * bytes);
      ++t0[four & 0xffff], ++t1[four >> 16 & 0xffff], ++t2[four >> 32 & 0xffff], ++t3[four >> 48];
    }
    for (; i < pairs; ++i) ++t0[fields[2 * i] | fields[2 * i + 1] << 8];
  }

  void move_to(int64_t *sums) {
    for (int table = 0; table < (step_ ? 4 : 1); ++table)
      for (int i = 0; i < kAllPairs; ++i) sums[i] += counts_[size_t(table * step_ + i)];
    std::fill(counts_.begin(), counts_.end(), 0);
  }

private:
  int step_;
  std::vector<uint32_t> counts_;
};

EncodeGroups encode_groups_for(const PairCodes &codes, int isa) {
#ifdef __x86_64__
  if (codes.ranked && byte_isa(isa) == kAvx512Bytes) return avx512vbmi::encode_groups;
#endif
  (void)codes, (void)isa;
  return scalar::encode_groups;
}

bool any_byte(const uint8_t *bytes, int64_t count) {
  uint8_t all = 0;
  for (int64_t i = 0; i < count; ++i) all |= bytes[i];
  return all;
}

// One block: its numbers, what becomes of them, and the fields in between.
class EncodedBlock {
public:
  EncodedBlock(const P7Encode &args, BlockPlanes &planes, int64_t block)
      : number_(args.split.number), bytes_(kSplits[number_].bytes), block_(block),
        count_(numbers_of_block(args.split.numel, block)), x_(planes.numbers(block)), all_codes_(args.codes),
        planes_(planes), parts_(planes.split(block, fields_)) {}

  void encode(const PairCodes &codes, EncodeGroups encode, int64_t last, Escapes::Run &run) {
    const int64_t groups = lossless_padded(count_) / kLosslessGroup;
    uint64_t escaped[kGroups];
    encode(codes, fields_, groups, codes_, escaped, planes_.ahead(block_ + 1, std::min(block_ + 2, last), kGroups));
    end_at((count_ + 1) / 2, groups, escaped);
    for (int64_t g = 0; g < groups; ++g)
      for (uint64_t left = escaped[g]; left; left &= left - 1) escape(g * kPairs + __builtin_ctzll(left), run);
    for (int p = 0; p < kSplits[number_].byte_planes; ++p)
      run.any[p] = run.any[p] || any_byte(parts_.bytes[p], lossless_padded(count_));
    planes_.write(codes_, groups * kCodeBytes, all_codes_ + block_ * int64_t(sizeof codes_), planes_.sums.data);
    planes_.write(block_);
  }

private:
  const int number_, bytes_;
  const int64_t block_, count_;
  const uint8_t *const x_;
  uint8_t *const all_codes_;
  BlockPlanes &planes_;
  alignas(64) uint8_t fields_[kLosslessBlock], codes_[kGroups * kCodeBytes];
  const SplitParts parts_;

  // Pairs wholly beyond the end have code 0.
  void end_at(int64_t pairs, int64_t groups, uint64_t *escaped) {
    if (pairs == groups * kPairs) return;
    const int64_t inside = pairs - (groups - 1) * kPairs;
    escaped[groups - 1] &= (uint64_t(1) << inside) - 1;
    uint8_t *last = codes_ + (groups - 1) * kCodeBytes;
    for (int64_t byte = inside * 7 / 8; byte < kCodeBytes; ++byte)
      last[byte] &= byte == inside * 7 / 8 ? uint8_t((1 << inside * 7 % 8) - 1) : 0;
  }

  void escape(int64_t pair, Escapes::Run &run) {
    run.positions.push_back(uint16_t(pair));
    const size_t at = run.values.size(), bytes = size_t(bytes_);
    run.values.resize(at + 2 * bytes, 0);
    memcpy(run.values.data() + at, x_ + 2 * size_t(pair) * bytes, (2 * pair + 1 < count_ ? 2 : 1) * bytes);
    for (int p = 0; p < kSplits[number_].byte_planes; ++p)
      parts_.bytes[p][2 * pair] = parts_.bytes[p][2 * pair + 1] = 0;
    for (int p = 0; p < kSplits[number_].bit_planes; ++p) parts_.bits[p][pair / 4] &= uint8_t(~(3 << 2 * (pair % 4)));
  }
};

} // namespace

void Escapes::write(uint16_t *positions, uint8_t *values) const {
  for (const Run &run : runs) {
    positions = std::copy(run.positions.begin(), run.positions.end(), positions);
    values = std::copy(run.values.begin(), run.values.end(), values);
  }
}

void p7_histogram_cpu(const void *x, int number, int64_t numel, int64_t *counts, int isa) {
  const SplitGroups split = fields_for(number, isa);
  const int64_t bytes = kSplits[number].bytes;
  std::fill(counts, counts + kAllPairs, 0);
  each_run_of_blocks(numel, [&](int, int64_t first, int64_t last) {
    PairCounts pairs(last - first > 16);
    alignas(64) uint8_t fields[kPiece];
    for (int64_t b = first; b < last; ++b) {
      const int64_t count = numbers_of_block(numel, b);
      const uint8_t *numbers = static_cast<const uint8_t *>(x) + b * kLosslessBlock * bytes;
      for (int64_t at = 0, some; at < count; at += some) {
        some = std::min(count - at, kPiece);
        split_block(split, number, numbers + at * bytes, some, {fields, {}, {}});
        pairs.count(fields, (some + 1) / 2, numbers + at * bytes + kAhead, bytes);
      }
      if (b + 1 < last && (b - first + 1) % 65536) continue; // long before a count overflows
#pragma omp critical(fastloss_p7_histogram)
      pairs.move_to(counts);
    }
  });
}

Escapes p7_encode_cpu(const P7Encode &args, int isa) {
  const int64_t numel = args.split.numel;
  const PairCodes codes(args.table);
  const EncodeGroups encode = encode_groups_for(codes, isa);
  Escapes escapes;
  escapes.runs.resize(size_t(runs_of_blocks(numel)));
  std::vector<SectionSums> sums(escapes.runs.size());
  each_run_of_blocks(numel, [&](int run, int64_t first, int64_t last) {
    Escapes::Run &found = escapes.runs[size_t(run)];
    const std::unique_ptr<BlockPlanes> planes(new BlockPlanes(args.split, isa));
    for (int64_t b = first; b < last; ++b) {
      EncodedBlock(args, *planes, b).encode(codes, encode, last, found);
      args.offsets[b + 1] = found.positions.size(); // within the run
    }
    planes->finish();
    sums[size_t(run)] = planes->sums;
  });
  args.offsets[0] = 0;
  if (args.sums) *args.sums = {};
  for (size_t r = 0, runs = escapes.runs.size(), blocks = size_t(lossless_blocks(numel)); r < runs; ++r) {
    const size_t first = r * blocks / runs, last = (r + 1) * blocks / runs;
    for (size_t b = first, base = args.offsets[b]; b < last; ++b) args.offsets[b + 1] += base;
    const int64_t numbers =
        lossless_padded(std::min(int64_t(last) * kLosslessBlock, numel)) - int64_t(first) * kLosslessBlock;
    if (args.sums) args.sums->append(sums[r], args.split.number, numbers, numbers / kLosslessGroup * kCodeBytes);
  }
  return escapes;
}

} // namespace fastloss
