// The terms contract of docs/design.md on a GPU. A row is dealt to several blocks, which keep it in shared memory where
// it fits: then the statistics and the gradient each read it once.
#include "cuda.h"
#include "row_terms_gradient.cuh"
#include "row_terms_statistics.cuh"

#include <algorithm>

namespace fastloss {
namespace {

int64_t size_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// Bytes of a row and its teacher that one of `slices` blocks keeps.
size_t slice_bytes(const RowTerms &p, int slices) {
  const int64_t groups = (p.v / kGroup + slices - 1) / slices;
  return size_t(groups * kGroup * (size_of(p.dtype) + (p.teacher ? size_of(p.teacher_dtype) : 0)));
}

size_t id_bytes(const RowTerms &p) { return size_t(id_vectors(p.k)) * sizeof(uint4); }

template <class T>
void launch_terms(const RowTerms &p, const RowStatsPlan &plan, int64_t first, int64_t rows, void *stream) {
  Launch l;
  l.grid = dim3(unsigned(rows * plan.slices));
  l.block = dim3(unsigned(plan.threads));
  l.smem = id_bytes(p) + (plan.keep ? slice_bytes(p, plan.slices) : 0);
  l.cluster = plan.cluster ? unsigned(plan.slices) : 1;
  l.stream = static_cast<decltype(l.stream)>(stream);
  launch(l, p.mode == kGradient ? row_terms_gradient<T> : row_terms_statistics<T>, p, first, plan.slices, plan.keep);
}

} // namespace

const char *row_terms_cuda_why_not(const RowTerms &p) {
  if (p.v >= int64_t(1) << 31) return "the CUDA kernel counts columns with 32 bits: V must be below 2^31";
  if (p.k > kMostListed) return "the CUDA kernel takes at most 8192 listed columns a row";
  return nullptr;
}

RowStatsPlan row_terms_plan(const RowTerms &p, const DeviceLimits &device) {
  const bool gradient = p.mode == kGradient;
  const size_t static_shared = 1024 + id_bytes(p);
  // Three blocks on a multiprocessor at least: while one waits for its row or its cluster, the others compute.
  const size_t roomy = device.shared_per_multiprocessor / 3 - 1024 - static_shared;
  const int most = gradient ? 64 : device.max_cluster; // blocks that need not talk to each other need no cluster
  RowStatsPlan plan{};
  for (plan.slices = 1; plan.slices < most; plan.slices *= 2) {
    const size_t slice = slice_bytes(p, plan.slices);
    const bool few_blocks = p.n * plan.slices < 4 * device.multiprocessors && slice >= 8192;
    if (!few_blocks && slice <= (gradient ? std::min<size_t>(roomy, 32768) : roomy)) break;
  }
  const size_t slice = slice_bytes(p, plan.slices);
  const int64_t groups = p.v / kGroup / plan.slices;
  plan.keep = slice + static_shared <= device.shared_per_block;
  plan.cluster = !gradient && plan.slices > 1;
  plan.threads = groups >= kTermThreads ? kTermThreads : groups >= 128 ? 128 : 64;
  plan.rows_per_launch = INT32_MAX / plan.slices;
  return plan;
}

void row_terms_launch(const RowTerms &p, const RowStatsPlan &plan, void *stream) {
  const auto launch_some = p.dtype == kFloat32   ? launch_terms<float>
                           : p.dtype == kFloat16 ? launch_terms<__half>
                                                 : launch_terms<__nv_bfloat16>;
  for (int64_t first = 0; first < p.n; first += plan.rows_per_launch)
    launch_some(p, plan, first, std::min(p.n - first, plan.rows_per_launch), stream);
}

void row_terms_cuda(const RowTerms &p, int device, void *stream) {
  if (const char *reason = row_terms_cuda_why_not(p)) throw std::runtime_error(reason);
  if (p.n == 0) return;
  const DeviceGuard guard(device);
  row_terms_launch(p, row_terms_plan(p, device_limits(device)), stream);
}

} // namespace fastloss
