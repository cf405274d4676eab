// How a product of rows of bits is cut into tasks for threads.
#pragma once
#include "bit_products.h"

#include <algorithm>

namespace fastloss::bits {

constexpr int64_t kPanelRows = 32;     // of a that are multiplied at once
constexpr int64_t kBlockColumns = 256; // of the sums that a consumer gets at once: with 32 rows, 32 KB

inline int64_t up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// How the work is cut: tasks of `rows` x `columns`, all those of a block of columns after each other.
struct Cut {
  int64_t rows, columns, row_tasks, tasks;
  Cut(const BitProducts &products, int64_t most_columns, int64_t least_rows, int threads)
      : columns(std::min(most_columns, up(products.b.rows, kPanelRows))) {
    const int64_t blocks = up(products.b.rows, columns) / columns;
    const int64_t wanted = threads > 1 ? 6 * threads : 1; // so many that nobody waits long for the last one
    const int64_t pieces = std::max<int64_t>(1, wanted / blocks);
    rows = std::max(least_rows, up((products.a.rows + pieces - 1) / pieces, kPanelRows));
    row_tasks = up(products.a.rows, rows) / rows;
    tasks = blocks * row_tasks;
  }
};

struct Task {
  int64_t row, last_row, column, columns;
};
inline Task task_of(const Cut &cut, const BitProducts &products, int64_t task) {
  const int64_t row = task % cut.row_tasks * cut.rows, column = task / cut.row_tasks * cut.columns;
  return {row, std::min(products.a.rows, row + cut.rows), column, std::min(cut.columns, products.b.rows - column)};
}

} // namespace fastloss::bits
