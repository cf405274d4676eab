// What CUDA devices there are and what they can do, asked once a device.
#include "cuda.h"

#include "common.cuh"

#include <mutex>
#include <vector>

namespace fastloss {

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError(); // no driver or no device: not an error for who only asks
  return 0;
}

static int attribute(cudaDeviceAttr what, int device) {
  int value = 0;
  cuda_check(cudaDeviceGetAttribute(&value, what, device));
  return value;
}

const DeviceLimits &device_limits(int device) {
  static std::mutex mutex;
  static std::vector<DeviceLimits> known = std::vector<DeviceLimits>(device_count()); // all zero until asked for
  if (device < 0 || device >= int(known.size()))
    throw std::runtime_error("no CUDA device " + std::to_string(device) + ", there are " +
                             std::to_string(known.size()));
  const std::lock_guard<std::mutex> lock(mutex);
  DeviceLimits &limits = known[size_t(device)];
  if (limits.multiprocessors == 0) {
    limits.max_cluster = attribute(cudaDevAttrClusterLaunch, device) ? 8 : 1; // 8 is the portable cluster size
    limits.shared_per_block = size_t(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    limits.shared_per_multiprocessor = size_t(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
    limits.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                        attribute(cudaDevAttrComputeCapabilityMinor, device);
    limits.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  }
  return limits;
}

std::string device_info(int device) {
  cudaDeviceProp properties{};
  cuda_check(cudaGetDeviceProperties(&properties, device));
  return std::string(properties.name) + ", sm_" + std::to_string(properties.major) + std::to_string(properties.minor) +
         ", " + std::to_string(properties.multiProcessorCount) + " multiprocessors, " +
         std::to_string(properties.totalGlobalMem >> 30) + " GiB";
}

} // namespace fastloss
