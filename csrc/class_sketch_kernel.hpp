// The inner kernel of class_sketch, compiled once per instruction set; the one the machine has is picked when it runs.
//
// No standard header with code in it may be included here or in the kernel's source: an inline function compiled for a
// newer instruction set could be the copy that the linker keeps for everybody.
#pragma once

#include <cstdint>

namespace gradmix::kernel {

// out (k x j) = [out +] sum over r < count of d[rows[r]] a[rows[r]]^T, accumulated in registers.
template <typename T>
struct Block {
  const T* deltas;
  std::int64_t delta_stride;
  const T* activations;
  std::int64_t activation_stride;
  const std::int64_t* rows;
  std::int64_t count;
  std::int64_t k;
  std::int64_t j;
  T* out;
  std::int64_t out_stride;
  bool accumulate;
  T* scratch;  // count * kMaxLanes entries
};

constexpr std::int64_t kMaxLanes = 16;

struct Table {
  const char* name;
  void (*float32)(const Block<float>&);
  void (*float64)(const Block<double>&);
  void (*from_bfloat16)(const std::uint16_t* from, float* to, std::int64_t count);
  void (*from_float16)(const std::uint16_t* from, float* to, std::int64_t count);
};

const Table& base();
const Table& avx2();
const Table& avx512();

}  // namespace gradmix::kernel
