// The operator class_sketch on a GPU: sums and squares as in class_sketch.hpp, of rows that are already sorted by class.
#pragma once

#include <cstdint>

#include "dtype.hpp"

namespace gradmix {

struct ClassSketchCuda {
  Dtype dtype;                 // of deltas and activations; everything floating below is float64 for float64, else float32
  const void* deltas;          // (samples, positions, rows)
  const void* activations;     // (samples, positions, columns)
  const std::int64_t* order;   // (samples,): the samples, sorted by class
  const std::int64_t* labels;  // (samples,): their classes, in that order
  const std::int64_t* starts;  // (classes + 1,): where each class begins in that order
  void* sums;                  // (classes, rows, columns), overwritten
  void* squares;               // (classes,), overwritten
  void* workspace;             // class_sketch_cuda_workspace elements, overwritten
  std::int64_t samples;
  std::int64_t positions;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t classes;
};

// Elements of the workspace, which depend on the sizes alone.
std::int64_t class_sketch_cuda_workspace(Dtype dtype, std::int64_t samples, std::int64_t positions, std::int64_t rows,
                                         std::int64_t columns);

// Queues the work on a stream of `device`; 0 is the default stream. Samples whose label lies outside [0, classes) are left
// out: it is for the caller to refuse them. The same bits in every run and on every device: work is cut by the sizes alone,
// nothing is added atomically.
void class_sketch_cuda(const ClassSketchCuda& problem, int device, std::uintptr_t stream);

}  // namespace gradmix
