// Which CUDA devices there are, asked without ever failing: a machine without a driver gets an answer too.
#pragma once

#include <string>
#include <vector>

namespace gradmix {

struct CudaDevice {
  std::string name;
  int major;
  int minor;
  unsigned long long memory;  // bytes
};

struct CudaDevices {
  int runtime_version = 0;  // as CUDA counts: 1000 * major + 10 * minor
  int driver_version = 0;   // 0: no driver
  std::string error;        // empty: none
  std::vector<CudaDevice> devices;
};

CudaDevices query_cuda_devices();

}  // namespace gradmix
