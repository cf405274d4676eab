// The row contract of docs/design.md on a GPU: which kernel runs, and with how many blocks a row.
#include "cuda.h"
#include "row_stats_general.cuh"
#include "row_stats_lean.cuh"

#include <algorithm>

namespace fastloss {
namespace {

int64_t element_size(int dtype) { return dtype == kFloat32 ? 4 : 2; }

bool is_lean(const RowStats &p) {
  return !p.prob && !p.column_weight && !p.want && p.scale == 1 && p.softcap == 0 && (p.target || p.mode != kBoth);
}

// Bytes of a row that one of its blocks keeps.
size_t slice_bytes(const RowStats &p, int slices) {
  const int64_t vectors = p.v * element_size(p.dtype) / 16;
  return size_t((vectors + slices - 1) / slices * 16);
}

template <class T>
void launch_rows(const RowStats &p, const RowStatsPlan &plan, int64_t first, int64_t rows, void *stream) {
  Launch l;
  l.grid = dim3(unsigned(rows * plan.slices));
  l.block = dim3(unsigned(plan.threads));
  l.smem = plan.keep ? slice_bytes(p, plan.slices) : 0;
  l.cluster = plan.cluster ? unsigned(plan.slices) : 1;
  l.stream = static_cast<decltype(l.stream)>(stream);
  if (!is_lean(p)) return launch(l, row_stats_general<T>, p, first, plan.slices, plan.keep);
  auto kernel = p.mode == kStats      ? row_stats_lean<T, kStats, false>
                : p.mode == kGradient ? row_stats_lean<T, kGradient, false>
                : plan.keep           ? row_stats_lean<T, kBoth, true>
                                      : row_stats_lean<T, kBoth, false>;
  launch(l, kernel, p, first, plan.slices);
}

} // namespace

const char *row_stats_cuda_why_not(const RowStats &p) {
  if (p.v >= int64_t(1) << 31) return "the CUDA kernel counts columns with 32 bits: V must be below 2^31";
  if (p.prob && p.prob_dtype != kFloat32 && p.prob_dtype != p.dtype)
    return "the CUDA kernel takes target probabilities in float32 or in the dtype of the logits";
  return nullptr;
}

RowStatsPlan row_stats_plan(const RowStats &p, const DeviceLimits &device) {
  const bool gradient = p.mode == kGradient, passes = p.mode == kBoth || (!gradient && !is_lean(p));
  const size_t row = slice_bytes(p, 1), static_shared = 1024;
  // Three blocks on a multiprocessor: while one waits for its cluster or writes, the others read. The driver keeps 1
  // KiB of each for itself.
  const size_t roomy = device.shared_per_multiprocessor / 3 - 1024 - static_shared;
  const int most = gradient ? 64 : device.max_cluster; // blocks that need not talk to each other need no cluster
  RowStatsPlan plan{};
  plan.slices = 1;
  while (plan.slices < most) {
    const size_t slice = row / size_t(plan.slices);
    const bool few_blocks = p.n * plan.slices < 4 * device.multiprocessors && slice >= 8192;
    if (!few_blocks && !(passes && slice > roomy) && !(gradient && slice > 32768)) break;
    plan.slices *= 2;
  }
  const size_t slice = slice_bytes(p, plan.slices);
  plan.keep = passes && slice + static_shared <= device.shared_per_block;
  plan.cluster = !gradient && plan.slices > 1;
  plan.threads = slice >= 16384 ? 256 : slice >= 4096 ? 128 : 64;
  if (plan.keep && 2 * (slice + 2 * static_shared) > device.shared_per_multiprocessor) plan.threads = kMaxThreads;
  plan.rows_per_launch = INT32_MAX / plan.slices;
  return plan;
}

void row_stats_launch(const RowStats &p, const RowStatsPlan &plan, void *stream) {
  const auto launch_some = p.dtype == kFloat32   ? launch_rows<float>
                           : p.dtype == kFloat16 ? launch_rows<__half>
                                                 : launch_rows<__nv_bfloat16>;
  for (int64_t first = 0; first < p.n; first += plan.rows_per_launch)
    launch_some(p, plan, first, std::min(p.n - first, plan.rows_per_launch), stream);
}

void row_stats_cuda(const RowStats &p, int device, void *stream) {
  if (const char *reason = row_stats_cuda_why_not(p)) throw std::runtime_error(reason);
  if (p.n == 0) return;
  const DeviceGuard guard(device);
  row_stats_launch(p, row_stats_plan(p, device_limits(device)), stream);
}

} // namespace fastloss
