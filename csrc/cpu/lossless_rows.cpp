// Rows of a compressed matrix. P7 and raw rows are decoded one by one, since only their groups are touched; R8 block by
// block, each touched one once, and from there to all rows that hold a part of it.
#include "lossless_blocks.h"
#include "lossless_decode.h"

#include <vector>

namespace fastloss {
namespace {

struct Rows {
  const LosslessBlocks &blocks;
  const int64_t *index, count;
  uint8_t *out;
  int64_t columns = blocks.c.columns, row_bytes = columns * blocks.item;

  // The part of output row `place`, of numbers first..first+columns, that lies in the `at`-th block of `coded`.
  void copy(int64_t place, const CodedPieces &coded, int64_t at) const {
    const int64_t first = index[place] * columns, start = coded.block(at) * kLosslessBlock;
    const int64_t from = std::max<int64_t>(first - start, 0);
    const int64_t to = std::min(first + columns - start, kLosslessBlock);
    blocks.decode(coded, at, from, to, out + place * row_bytes + (start + from - first) * blocks.item);
  }
};

void by_row(const Rows &rows) {
  const int threads = rows.blocks.threads(rows.count * rows.columns, rows.count);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t place = 0; place < rows.count; ++place) {
    const int64_t first = rows.index[place] * rows.columns;
    for (int64_t b = first / kLosslessBlock; b < lossless_blocks(first + rows.columns); ++b)
      rows.copy(place, CodedPieces(rows.blocks, b, 1, kLosslessBlock, nullptr), 0);
  }
}

// The blocks that rows in `order` (rising index) touch, rising.
std::vector<int64_t> touched_blocks(const Rows &rows, const std::vector<int64_t> &order) {
  std::vector<int64_t> touched;
  int64_t next = 0;
  for (const int64_t place : order) {
    const int64_t first = rows.index[place] * rows.columns;
    for (int64_t b = std::max(next, first / kLosslessBlock); b < lossless_blocks(first + rows.columns); ++b)
      touched.push_back(b), next = b + 1;
  }
  return touched;
}

void by_block(const Rows &rows) {
  const LosslessBlocks &blocks = rows.blocks;
  std::vector<int64_t> order(size_t(rows.count));
  for (size_t i = 0; i < order.size(); ++i) order[i] = int64_t(i);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return rows.index[a] < rows.index[b]; });
  const std::vector<int64_t> touched = touched_blocks(rows, order);
  std::vector<size_t> runs = {0}; // where each run of up to together() neighbouring blocks begins, and the end
  for (size_t i = 1; i <= touched.size(); ++i)
    if (i == touched.size() || touched[i] != touched[i - 1] + 1 || i - runs.back() == size_t(blocks.together()))
      runs.push_back(i);
  const int64_t tasks = int64_t(runs.size()) - 1;
  const int threads = blocks.threads(int64_t(touched.size()) * kLosslessBlock, tasks);
  const ThreadRoom rooms(threads, CodedPieces::room(blocks, kLosslessBlock));
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const size_t begin = runs[size_t(task)], end = runs[size_t(task) + 1];
    CodedPieces coded(blocks, touched[begin], int64_t(end - begin), kLosslessBlock, rooms.of(omp_get_thread_num()));
    coded.next();
    for (size_t i = begin; i < end; ++i) {
      const int64_t start = touched[i] * kLosslessBlock, stop = start + kLosslessBlock;
      auto place = std::partition_point(order.begin(), order.end(),
                                        [&](int64_t p) { return (rows.index[p] + 1) * rows.columns <= start; });
      for (; place != order.end() && rows.index[*place] * rows.columns < stop; ++place)
        rows.copy(*place, coded, int64_t(i - begin));
    }
  }
}

} // namespace

int64_t lossless_rows_cpu(const Compressed &c, int item, const int64_t *index, int64_t count, uint8_t *out, int isa) {
  for (int64_t place = 0; place < count; ++place)
    if (index[place] < 0 || index[place] >= c.rows) return place;
  const LosslessBlocks blocks(c, item, isa);
  if (!count || !c.columns) return -1;
  const Rows rows = {blocks, index, count, out};
  if (c.codec == kR8) by_block(rows);
  else by_row(rows);
  return -1;
}

} // namespace fastloss
