// Launching on the caller's stream and device: every failure becomes an exception that says which kernel, for which sizes,
// and what CUDA says about it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace gradmix {

inline void cuda_check(cudaError_t error, const std::string& doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // reported here; it must not surface in a later call
  throw std::runtime_error(doing + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// Makes `device` this thread's current one until the end of the scope.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    cuda_check(cudaGetDevice(&before_), "asking for the current device");
    if (device == before_) return;
    cuda_check(cudaSetDevice(device), "choosing device " + std::to_string(device));
    changed_ = true;
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

struct Grid {
  std::int64_t x, y;
};

// Launches kernel(parameters). Parameters is a plain struct for which describe(parameters) says the sizes in words.
//
// The call is used rather than triple angle brackets because any C++ compiler can read it, and because it returns its error.
template <typename Parameters>
void launch(const char* name, void (*kernel)(Parameters), const Grid& grid, int threads, cudaStream_t stream,
            const Parameters& parameters) {
  const auto doing = [&] {
    return std::string(name) + " (" + describe(parameters) + "; grid " + std::to_string(grid.x) + " x " +
           std::to_string(grid.y) + ")";
  };
  if (grid.x > 0x7fffffff || grid.y > 0xffff) {
    throw std::runtime_error(doing() + ": more blocks than a launch may have");
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, parameters);
  if (error != cudaSuccess) cuda_check(error, doing());
}

}  // namespace gradmix
