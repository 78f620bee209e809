// The operator sketch_project on a GPU, Rademacher entries: out[n,t,i] = sum over j of M[i,j] x[n,t,j] (+ M[i,D]), with M
// made of counter_random.hpp's words where it is needed.
#pragma once

#include <cstdint>

#include "dtype.hpp"

namespace gradmix {

struct SketchProjectCuda {
  Dtype dtype;            // of x; out and workspace are float64 for float64, else float32
  const void* x;          // (samples, positions, dim); stride[2] == 1 ("rows") or stride[1] == 1 ("planes")
  std::int64_t stride[3];  // in elements
  void* out;              // (samples, positions, rank), overwritten
  void* workspace;        // sketch_project_cuda_workspace elements, overwritten
  std::int64_t samples;
  std::int64_t positions;
  std::int64_t dim;
  std::int64_t rank;
  std::int64_t key;
  bool ones;
};

// Elements of the workspace, which depend on the sizes alone.
std::int64_t sketch_project_cuda_workspace(Dtype dtype, std::int64_t samples, std::int64_t positions, std::int64_t dim,
                                           std::int64_t rank);

// Queues the work on a stream of `device`; 0 is the default stream. The same bits in every run, on every device and for
// both layouts.
void sketch_project_cuda(const SketchProjectCuda& problem, int device, std::uintptr_t stream);

}  // namespace gradmix
