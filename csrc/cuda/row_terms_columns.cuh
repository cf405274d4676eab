// How row_terms reads a row: [head | groups | tail], the groups dealt to the row's blocks and kept in shared memory
// between the passes where they fit.
#pragma once
#include "row_stats_general.cuh"
#include "row_terms.h"

namespace fastloss {

// Columns that a thread takes at a time: whole 16-byte vectors of every dtype.
constexpr int kGroup = 8;

__device__ inline float score_of(const RowTerms &p, float logit) {
  return p.softcap == 0 ? logit * p.scale : p.softcap * tanhf(logit * p.scale / p.softcap);
}

// A group, or a single column: scores, the teacher's (0 without a teacher), and which of the columns are listed.
template <int W> struct TermColumns {
  float z[W], t[W];
  int first;
  unsigned listed;
};
template <class C> constexpr int kColumns = sizeof(C::z) / sizeof(float);

// A group at its 16-byte boundary, in global or shared memory.
template <class Q> __device__ void read_group(const void *from, bool kept, float (&x)[kGroup]) {
  constexpr int N = kWidth<Q>;
  const uint4 *raw = static_cast<const uint4 *>(from);
#pragma unroll
  for (int v = 0; v < kGroup / N; ++v) {
    float y[N];
    unpack<Q>(kept ? raw[v] : load_stream(raw + v), y);
#pragma unroll
    for (int k = 0; k < N; ++k) x[v * N + k] = y[k];
  }
}

template <class T> class TermColumnsOfRow {
public:
  // `listed`: k ids, -1 for none, in shared memory. `kept`: shared memory for the block's groups, or null.
  __device__ TermColumnsOfRow(const RowTerms &p, int64_t row, const int *listed, int slices, int rank, uint4 *kept)
      : p_(p), listed_(listed), kept_(kept) {
    logits_ = static_cast<const T *>(p.logits) + row * p.ld;
    const int v = int(p.v), t = threadIdx.x;
    // Counted in columns, not in bytes: a teacher of another dtype that starts alike is aligned alike.
    const int past = int(reinterpret_cast<uintptr_t>(logits_) / sizeof(T) % kGroup);
    const int head = min(v, (kGroup - past) % kGroup), groups = (v - head) / kGroup;
    const int tail = v - head - groups * kGroup;
    const int each = (groups + slices - 1) / slices, before = min(groups, rank * each);
    groups_ = min(groups - before, each);
    first_ = head + before * kGroup;
    single_ = rank || t >= head + tail ? -1 : t < head ? t : t + groups * kGroup;
    if (!p.teacher) return;
    teacher_ = static_cast<const char *>(p.teacher) + row * p.ld_teacher * teacher_size();
    teacher_aligned_ = reinterpret_cast<uintptr_t>(teacher_ + int64_t(first_) * teacher_size()) % 16 == 0;
    keeps_teacher_ = kept && teacher_aligned_;
  }

  // The groups to shared memory, if they stay there. A thread only reads what it copied itself: no barrier.
  __device__ void load() const {
    if (!kept_) return;
    const int vectors = kGroup / kWidth<T>, teacher_vectors = kGroup * teacher_size() / 16;
    for (int i = threadIdx.x; i < groups_; i += blockDim.x) {
      const char *from = reinterpret_cast<const char *>(logits_ + first_ + i * kGroup);
      for (int k = 0; k < vectors; ++k) cp_async16(kept_ + i * vectors + k, from + k * 16);
      if (!keeps_teacher_) continue;
      from = teacher_ + int64_t(first_ + i * kGroup) * teacher_size();
      for (int k = 0; k < teacher_vectors; ++k) cp_async16(kept_teacher(i) + k, from + k * 16);
    }
    cp_async_commit();
    cp_async_wait<0>();
  }

  // f(columns) for all columns of this thread. A thread has read them before f may overwrite them.
  template <class F> __device__ void each(F f) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < groups_; i += blockDim.x) {
      TermColumns<kGroup> c;
      c.first = first_ + i * kGroup;
      const uint4 *kept = kept_ + i * (kGroup / kWidth<T>);
      read_group<T>(kept_ ? static_cast<const void *>(kept) : logits_ + c.first, kept_, c.z);
      read_teacher(i, c);
      finish(c);
      f(c);
    }
    if (single_ < 0) return;
    TermColumns<1> c{{to_float(logits_[single_])}, {teacher_ ? teacher_at(single_) : 0}, single_, 0};
    finish(c);
    f(c);
  }

private:
  // Where group i of the teacher is kept: after all of the logits' groups.
  __device__ uint4 *kept_teacher(int i) const {
    return kept_ + groups_ * (kGroup / kWidth<T>)+i * (kGroup * teacher_size() / 16);
  }
  __device__ int teacher_size() const { return p_.teacher_dtype == kFloat32 ? 4 : 2; }
  __device__ float teacher_at(int column) const {
    const void *row = teacher_;
    if (p_.teacher_dtype == kFloat32) return static_cast<const float *>(row)[column];
    if (p_.teacher_dtype == kFloat16) return to_float(static_cast<const __half *>(row)[column]);
    return to_float(static_cast<const __nv_bfloat16 *>(row)[column]);
  }

  __device__ void read_teacher(int i, TermColumns<kGroup> &c) const {
    if (!teacher_ || !teacher_aligned_) {
#pragma unroll
      for (int k = 0; k < kGroup; ++k) c.t[k] = teacher_ ? teacher_at(c.first + k) : 0;
      return;
    }
    const void *from =
        keeps_teacher_ ? static_cast<const void *>(kept_teacher(i)) : teacher_ + int64_t(c.first) * teacher_size();
    if (p_.teacher_dtype == kFloat32) read_group<float>(from, keeps_teacher_, c.t);
    else if (p_.teacher_dtype == kFloat16) read_group<__half>(from, keeps_teacher_, c.t);
    else read_group<__nv_bfloat16>(from, keeps_teacher_, c.t);
  }

  template <class C> __device__ void finish(C &c) const {
#pragma unroll
    for (float &z : c.z) z = score_of(p_, z);
    c.listed = 0;
#pragma unroll 1
    for (int k = 0; k < p_.k; ++k) { // the distance to none, -1, is never below kGroup
      const unsigned at = unsigned(listed_[k]) - unsigned(c.first);
      if (at < unsigned(kColumns<C>)) c.listed |= 1u << at;
    }
  }

  const RowTerms &p_;
  const int *listed_;
  uint4 *kept_;
  const T *logits_;
  const char *teacher_ = nullptr;
  int first_, groups_, single_;
  bool teacher_aligned_ = false, keeps_teacher_ = false;
};

constexpr int kTermThreads = 256, kTermWarps = kTermThreads / 32;

// Shared memory of a block: the ids, then what is kept of the row.
__host__ __device__ constexpr int64_t id_vectors(int64_t k) { return (k + 3) / 4; }
__device__ inline uint4 *after_ids(int *listed, int64_t k) { return reinterpret_cast<uint4 *>(listed) + id_vectors(k); }

// Ids to shared memory; returns whether one is out of range. Every thread calls it.
__device__ inline bool read_listed(const RowTerms &p, int64_t row, int *to) {
  bool bad = false;
  for (int k = threadIdx.x; k < p.k; k += blockDim.x) {
    const int64_t id = p.listed[row * p.k + k];
    const bool absent = id < 0 || id == p.ignore_index;
    bad |= !absent && id >= p.v;
    to[k] = absent || id >= p.v ? -1 : int(id);
  }
  return __syncthreads_or(bad);
}

__device__ inline bool is_ignored(const RowTerms &p, int64_t row) {
  return p.k > 0 && p.listed[row * p.k] == p.ignore_index;
}

} // namespace fastloss
