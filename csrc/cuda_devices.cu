#include "cuda_devices.hpp"

#include <cuda_runtime.h>

#include "cuda_check.hpp"  // unused: the build tries this file first, and with it what the others need of CUDA

namespace gradmix {
namespace {

std::string text(cudaError_t error) { return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error); }

}  // namespace

CudaDevices query_cuda_devices() {
  CudaDevices answer;
  cudaError_t error = cudaRuntimeGetVersion(&answer.runtime_version);
  if (error == cudaSuccess) error = cudaDriverGetVersion(&answer.driver_version);
  int count = 0;
  if (error == cudaSuccess) error = cudaGetDeviceCount(&count);
  for (int i = 0; i < count && error == cudaSuccess; ++i) {
    cudaDeviceProp properties;
    error = cudaGetDeviceProperties(&properties, i);
    if (error == cudaSuccess) {
      answer.devices.push_back({properties.name, properties.major, properties.minor, properties.totalGlobalMem});
    }
  }
  if (error != cudaSuccess) {
    answer.error = text(error);
    cudaGetLastError();  // the failure is reported here and must not surface in a later call
  }
  return answer;
}

}  // namespace gradmix
