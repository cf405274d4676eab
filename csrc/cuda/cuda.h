// The CUDA backend: launchers on raw device pointers, and what device there is. No torch, no CUDA header.
#pragma once
#include "fastloss.h"
#include "pair_stats.h"
#include "region_stats.h"
#include "row_terms.h"

#include <cstddef>
#include <string>

namespace fastloss {

// What a plan depends on.
struct DeviceLimits {
  int multiprocessors;
  int max_cluster;         // blocks that can share a row: 1 below sm_90
  size_t shared_per_block; // bytes of dynamic shared memory that a block may have
  size_t shared_per_multiprocessor;
  int capability; // 90 is sm_90
};

int device_count();                  // 0 where there is no driver
std::string device_info(int device); // "NVIDIA H200, sm_90, 132 multiprocessors, 139 GiB"
const DeviceLimits &device_limits(int device);

// How the rows of one call are dealt to blocks.
struct RowStatsPlan {
  int threads;  // of a block
  int slices;   // blocks that share a row
  bool cluster; // they run as one cluster, as they must where they exchange statistics
  bool keep;    // the row stays in shared memory between the passes; else it is read again, from L2 if we are lucky
  int64_t rows_per_launch; // a grid has at most 2^31 - 1 blocks
};

// Null, or why row_stats_cuda cannot run this.
const char *row_stats_cuda_why_not(const RowStats &);
RowStatsPlan row_stats_plan(const RowStats &, const DeviceLimits &);
void row_stats_launch(const RowStats &, const RowStatsPlan &, void *stream);
// Runs on `stream` of `device`, without a synchronisation or an allocation. A launch that fails is a
// std::runtime_error.
void row_stats_cuda(const RowStats &, int device, void *stream);

// The terms contract; null, or why row_terms_cuda cannot run this.
constexpr int kMostListed = 8192; // their ids are in shared memory
const char *row_terms_cuda_why_not(const RowTerms &);
RowStatsPlan row_terms_plan(const RowTerms &, const DeviceLimits &);
void row_terms_launch(const RowTerms &, const RowStatsPlan &, void *stream);
void row_terms_cuda(const RowTerms &, int device, void *stream);

// How the rows of row_sample are dealt to blocks; the slices of a row are one cluster.
struct RowSamplePlan {
  int threads, slices;
  int64_t rows_per_launch;
};
RowSamplePlan row_sample_plan(const RowSample &, const DeviceLimits &);
void row_sample_launch(const RowSample &, const RowSamplePlan &, void *stream);
void row_sample_cuda(const RowSample &, int device, void *stream);

// x[0..n) *= *factor in place, a number on the device; where it is 1, nothing is read or written.
void scale_cuda(void *x, int dtype, int64_t n, const float *factor, int device, void *stream);

// Statistics of regions, or with `coef` the gradient. `slices` blocks share a region, and each leaves its own sums.
void region_stats_cuda(const RegionStats &, int slices, int device, void *stream);
// A block has one sum: more blocks than this are never launched.
constexpr int kMostPartials = 2048;
// A target in float32 or in the dtype of the input; values in the wider of the two.
void pointwise_loss_cuda(const PointwiseLoss &, int device, void *stream);

// The dot products along a list of edges; an edge out of range has NaN.
void edge_dot_cuda(const EdgeDot &, int device, void *stream);
// Their gradient; a source out of range makes its row NaN, and `pointer` is never followed beyond the edges.
void edge_sum_cuda(const EdgeSum &, int device, void *stream);

} // namespace fastloss
