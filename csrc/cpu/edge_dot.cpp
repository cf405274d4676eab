// docs/design.md, "Edges", on the CPU: an edge's two rows are read where they lie, and nothing of size [edges, d]
// exists.
#include "edge_dot.h"
#include "cpu.h"
#include "simd.h"

#include <algorithm>
#include <omp.h>
#include <stdexcept>
#include <string>

namespace fastloss {
namespace {

constexpr int64_t kFetched =
    4096; // bytes of a row asked for ahead; the processor sees by itself how a longer one goes on
constexpr int64_t kColumns = 1024;   // of a row that one thread sums at a time
constexpr int64_t kSerial = 1 << 15; // products that are not worth waking a second thread

struct EdgeLoops {
  void (*dots)(const EdgeDot &, int64_t begin, int64_t end);
  void (*sums)(const EdgeSum &, int64_t row, int64_t begin, int64_t end);
};

} // namespace

#define FASTLOSS_LOOPS "edge_dot.inc"
#include "each_isa.inc"
#undef FASTLOSS_LOOPS

namespace {

EdgeLoops loops_for(int dtype, int isa) {
  const int best = best_isa();
  if (isa < kBestIsa || isa > best)
    throw std::invalid_argument("isa must be -1 (best) to " + std::to_string(best) + " (" + isa_name(best) +
                                ") on this machine, got " + std::to_string(isa));
#ifdef __x86_64__
  const int level = isa == kBestIsa ? best : isa;
  if (level == kAvx512Bf16) return avx512bf16::edge_loops(dtype);
  if (level == kAvx512) return avx512::edge_loops(dtype);
  if (level == kAvx2) return avx2::edge_loops(dtype);
#endif
  return scalar::edge_loops(dtype);
}

void check_ids(const char *name, const int64_t *ids, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= limit)
      throw std::out_of_range(std::string(name) + " must be in [0, " + std::to_string(limit) + "), got " +
                              std::to_string(ids[i]) + " at " + std::to_string(i));
}

void check_pointer(const int64_t *pointer, int64_t rows, int64_t edges) {
  if (pointer[0] != 0 || pointer[rows] != edges)
    throw std::out_of_range("pointer must go from 0 to " + std::to_string(edges) + ", got " +
                            std::to_string(pointer[0]) + " to " + std::to_string(pointer[rows]));
  for (int64_t i = 0; i < rows; ++i)
    if (pointer[i] > pointer[i + 1])
      throw std::out_of_range("pointer must not fall, got " + std::to_string(pointer[i]) + " before " +
                              std::to_string(pointer[i + 1]) + " at " + std::to_string(i));
}

int threads_for(int64_t products, int64_t tasks) {
  return products <= kSerial ? 1 : int(std::max<int64_t>(1, std::min<int64_t>(omp_get_max_threads(), tasks)));
}

} // namespace

void edge_dot_cpu(const EdgeDot &args, int isa) {
  const EdgeLoops loops = loops_for(args.dtype, isa);
  check_ids("rows", args.rows, args.edges, args.m);
  check_ids("columns", args.columns, args.edges, args.n);
  const int threads = threads_for(args.edges * args.d, args.edges);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    loops.dots(args, args.edges * thread / team, args.edges * (thread + 1) / team);
  }
}

void edge_sum_cpu(const EdgeSum &args, int isa) {
  const EdgeLoops loops = loops_for(args.dtype, isa);
  check_pointer(args.pointer, args.m, args.edges);
  check_ids("source", args.source, args.edges, args.n);
  const int64_t parts = (args.d + kColumns - 1) / kColumns, tasks = args.m * parts;
  const int threads = threads_for((args.edges + args.m) * args.d, tasks);
  // Rows differ in their number of edges; a sum is one thread's work, whichever.
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t column = task % parts * kColumns;
    loops.sums(args, task / parts, column, std::min(args.d, column + kColumns));
  }
}

} // namespace fastloss
