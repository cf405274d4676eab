// The one include of a kernel file, which is built twice: by nvcc for a GPU, by g++ (-x c++) for tests on the host.
// It names what the two builds must spell differently: shared memory, launches, clusters, cp.async, mma. Each wrapper
// here has a twin under host/; a kernel that needs one more adds both.
#pragma once
#ifndef __CUDACC__
#include "host/cuda_emu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

// SHARED_DYNAMIC(uint4, row); SHARED_ARRAY(float, part, [2][32]);
#define SHARED_DYNAMIC(T, name)                                                                                        \
  extern __shared__ uint4 dynamic_shared_[];                                                                           \
  T *const name = reinterpret_cast<T *>(dynamic_shared_)
#define SHARED_ARRAY(T, name, ...) __shared__ __align__(16) T name __VA_ARGS__

namespace fastloss {

inline void cuda_check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError(); // the error is reported once, here: the next launch must not see it again
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Makes `device` current, and puts back the one that was.
class DeviceGuard {
public:
  explicit DeviceGuard(int device) {
    cuda_check(cudaGetDevice(&before_));
    if (device == before_) return;
    cuda_check(cudaSetDevice(device));
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard &) = delete;
  DeviceGuard &operator=(const DeviceGuard &) = delete;

private:
  int before_ = 0;
  bool changed_ = false;
};

struct Launch {
  dim3 grid, block;
  size_t smem = 0;
  unsigned cluster = 1;
  cudaStream_t stream = nullptr;
};

template <class... P, class... A> void launch(const Launch &l, void (*kernel)(P...), A... a) {
  if (l.smem > (48 << 10))
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(l.smem)));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = l.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = l.grid;
  config.blockDim = l.block;
  config.dynamicSmemBytes = l.smem;
  config.stream = l.stream;
  config.attrs = &cluster;
  config.numAttrs = l.cluster > 1; // a plain launch on devices without clusters
  cuda_check(cudaLaunchKernelEx(&config, kernel, P(a)...));
}

// 16 bytes that are read once: past L1. Volatile, so that it may also read what this kernel overwrites later.
__device__ inline uint4 load_stream(const uint4 *p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// 2^x, relative error 2^-22; what would be subnormal is 0. exp2f does the same with two more instructions around it.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- clusters: below sm_90 a cluster is one block
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ inline unsigned cluster_rank() {
  unsigned r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
__device__ inline unsigned cluster_size() {
  unsigned r;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
  return r;
}
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
// For who has only read: nothing is published, and no fence waits for the stores that are under way.
__device__ inline void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
template <class T> __device__ T *cluster_map(T *p, unsigned rank) {
  T *q;
  asm("mapa.u64 %0, %1, %2;" : "=l"(q) : "l"(p), "r"(rank));
  return q;
}
#else
__device__ inline unsigned cluster_rank() { return 0; }
__device__ inline unsigned cluster_size() { return 1; }
__device__ inline void cluster_arrive() {}
__device__ inline void cluster_arrive_relaxed() {}
__device__ inline void cluster_wait() { __syncthreads(); }
template <class T> __device__ T *cluster_map(T *p, unsigned) { return p; }
#endif
__device__ inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// ---- cp.async: 16 bytes, the last 16 - bytes of them zero. The address is a number to count up in a loop: made from a
// pointer there, it costs more instructions than the copy.
using SharedAddress = unsigned;
__device__ inline SharedAddress shared_address(const void *shared) {
  return unsigned(__cvta_generic_to_shared(shared));
}
__device__ inline void cp_async16(SharedAddress shared, const void *global, unsigned bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
__device__ inline void cp_async16(void *shared, const void *global, unsigned bytes = 16) {
  cp_async16(shared_address(shared), global, bytes);
}
__device__ inline void cp_async8(SharedAddress shared, const void *global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared), "l"(global) : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

// ---- tensor cores, c += a b
// Four 8 x 8 matrices of 16-bit numbers; lane 8m + i names the 16 bytes of row i of matrix m, and lane 4i + j gets the
// j-th word of row i of each.
__device__ inline void ldmatrix_x4(unsigned (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
// From sm_100 on there are no tensor cores for bits, and ptxas would make eight int8 instructions of one.
__device__ inline void mma_m16n8k256_b1_and(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 1000
  asm volatile("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}
__device__ inline void mma_m16n8k32_s8(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma_m16n8k16_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

} // namespace fastloss
#endif
