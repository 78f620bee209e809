// The operator sketch_project on the CPU: out[n,t,i] = sum over j of M[i,j] x[n,t,j] (+ M[i,D]), where M holds plus and minus
// 1 / sqrt(rank) by the bits of a counter-based generator (counter_random.hpp) and is never stored.
#pragma once

#include <cstdint>

#include "tensor_view.hpp"

namespace gradmix {

struct SketchProject {
  Dtype dtype;    // of x; the result is float64 for float64, else float32
  const void* x;  // (samples, positions, columns)
  std::int64_t samples;
  std::int64_t positions;
  std::int64_t columns;
  std::int64_t sample_stride;  // in elements
  std::int64_t position_stride;
  std::int64_t column_stride;
  bool ones;  // a column of ones is thought behind the last
  std::int64_t key;
  std::int64_t rank;
  void* out;  // (samples, positions, rank), overwritten
};

// Whether one of the two inner axes is contiguous, which sketch_project needs.
bool sketch_project_takes(const SketchProject& problem);

// The same bits for every number of threads: a position's sums do not depend on the others.
void sketch_project(const SketchProject& problem, int threads);

}  // namespace gradmix
