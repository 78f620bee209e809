// Stands in for CUDA's header of this name, so that a C++ compiler for the CPU reads the very same .cu sources: each thread
// of a block is a fiber, blocks run one after the other, and a barrier is where fibers change.
//
// What is kept: every index, every value, the order of additions, what a missing barrier does (fibers run in several orders,
// and under a thread sanitizer each is a thread of its own). What is not: the hardware's own limits and errors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks do not overlap, so the variable may outlive them

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

// ------------------------------------------------------------------------------------------------ threads (fibers.cpp)

namespace on_host {

using Body = void (*)(const void* argument);

// Runs body(argument) as every thread of every block.
void run(Body body, const void* argument, dim3 grid, dim3 block);

// Waits for all threads of the block.
void block_barrier();

// Waits for all threads of the warp and exchanges 8 bytes: what lane `from` brought. `from` outside the warp: one's own.
std::uint64_t warp_exchange(std::uint64_t brought, int from);

}  // namespace on_host

inline void __syncthreads() { on_host::block_barrier(); }

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned away) {
  static_assert(sizeof(T) <= 8, "one register or two");
  (void)mask;  // whole warps only
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int from = lane + static_cast<int>(away);
  std::uint64_t brought = 0;
  std::memcpy(&brought, &value, sizeof value);
  const std::uint64_t got = on_host::warp_exchange(brought, from < 32 ? from : lane);
  std::memcpy(&value, &got, sizeof value);
  return value;
}

// ------------------------------------------------------------------------------------------------------------ the runtime

using cudaStream_t = void*;

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };

inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration" : "cudaErrorInvalidValue";
}
inline const char* cudaGetErrorString(cudaError_t) { return "refused by the stand-in"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
inline cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <typename Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters),
                               const Parameters& parameters) {
  const dim3 &g = config->gridDim, &b = config->blockDim;
  if (g.x == 0 || g.y == 0 || g.z == 0 || b.x == 0 || b.x * b.y * b.z > 1024) return cudaErrorInvalidConfiguration;
  struct Call {
    void (*kernel)(Parameters);
    const Parameters* parameters;
  } const call = {kernel, &parameters};
  on_host::run(
      [](const void* argument) {
        const Call& c = *static_cast<const Call*>(argument);
        c.kernel(*c.parameters);
      },
      &call, g, b);
  return cudaSuccess;
}
