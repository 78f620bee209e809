// The operator class_sketch on the CPU. With G[n] = sum over the positions t of d[n,t,:] a[n,t,:]^T:
// sums[p] = sum of G[n], squares[p] = sum of ||G[n]||^2, over the samples n of class p.
#pragma once

#include <cstdint>

#include "tensor_view.hpp"

namespace gradmix {

struct ClassSketch {
  Dtype dtype;                 // of deltas and activations; the results are float64 for float64, else float32
  const void* deltas;          // (samples, positions, rows)
  const void* activations;     // (samples, positions, columns)
  const std::int64_t* labels;  // (samples,), each in [0, classes)
  void* sums;                  // (classes, rows, columns), overwritten
  void* squares;               // (classes,), overwritten
  std::int64_t samples;
  std::int64_t positions;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t classes;
};

// The first index whose label lies outside [0, classes), or -1.
std::int64_t first_bad_label(const std::int64_t* labels, std::int64_t samples, std::int64_t classes);

// The same bits for every number of threads: work is cut by the shapes alone, and partial sums are added in a fixed order.
void class_sketch(const ClassSketch& problem, int threads);

}  // namespace gradmix
