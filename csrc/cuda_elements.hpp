// Elements as they lie in device memory, and how they are read: one by one, or 16 bytes at a time where that is aligned.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace gradmix {

// Either half type; which of the two is a parameter of the kernel, so that one compiled kernel serves both.
struct Half {
  std::uint16_t bits;
};

// An element in the type that is computed with. `bfloat`: a half is a bfloat16, not a float16.
template <typename T>
__device__ __forceinline__ T widen(T value, bool) {
  return value;
}
template <typename T>
__device__ __forceinline__ T widen(Half value, bool bfloat) {
  const std::uint32_t shifted = static_cast<std::uint32_t>(value.bits) << 16;
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return bfloat ? __uint_as_float(shifted) : result;
#else
  // A float16's exponent and mantissa in float32's places, the bias put right by a multiplication; infinity and NaN keep
  // theirs.
  const std::uint32_t moved = (value.bits & 0x7fffu) << 13;
  float result;
  __builtin_memcpy(&result, &moved, sizeof result);
  result *= 0x1p112f;
  std::uint32_t bits;
  __builtin_memcpy(&bits, &result, sizeof bits);
  bits |= (value.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  bits |= (value.bits & 0x8000u) << 16;
  if (bfloat) bits = shifted;
  __builtin_memcpy(&result, &bits, sizeof result);
  return result;
#endif
}

// Count elements side by side, read and written as one where they are 16 bytes or less.
template <typename T, int Count>
struct alignas(sizeof(T) * Count > 16 ? 16 : sizeof(T) * Count) Pack {
  T at[Count];
};

inline bool aligned_to(const void* pointer, std::int64_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % static_cast<std::uintptr_t>(bytes) == 0;
}

// The sum over the threads of a block, for its first thread; in one order, whatever the hardware does. Every thread of the
// block calls it. `scratch` holds one value for each warp, and nobody may touch it until the block's next barrier.
template <int Threads, typename T>
__device__ __forceinline__ T block_sum(T value, T* scratch) {
  static_assert(Threads % 32 == 0, "whole warps");
#pragma unroll
  for (int away = 16; away > 0; away /= 2) value += __shfl_down_sync(0xffffffffu, value, away);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  T sum = 0;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int warp = 0; warp < Threads / 32; ++warp) sum += scratch[warp];
  }
  return sum;
}

}  // namespace gradmix
