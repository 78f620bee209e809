// The inner kernel of class_sketch, compiled once per instruction set; the one the machine has is picked when it runs.
//
// No standard header with code in it may be included here or in the kernel's source: an inline function compiled for a
// newer instruction set could be the copy that the linker keeps for everybody.
#pragma once

#include <cstdint>

namespace gradmix::class_sketch_kernel {

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
  void (*block_float32)(const Block<float>&);
  void (*block_float64)(const Block<double>&);
  // The sum of the squares of a (rows x columns) product, which is also added to `out` unless that is null.
  double (*take_float32)(const float* product, std::int64_t stride, std::int64_t rows, std::int64_t columns, float* out,
                         std::int64_t out_stride);
  double (*take_float64)(const double* product, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                         double* out, std::int64_t out_stride);
  void (*from_bfloat16)(const std::uint16_t* from, float* to, std::int64_t count);
  void (*from_float16)(const std::uint16_t* from, float* to, std::int64_t count);
};

const Table& base();
const Table& avx2();
const Table& avx512();

}  // namespace gradmix::class_sketch_kernel
