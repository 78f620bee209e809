// The operators' CUDA bodies, run on the CPU, as C functions for tests/kernels/test_cuda_bodies.py. Arguments as in the headers;
// `dtype` counts as Dtype does. The answer is empty, or what went wrong.
#include <exception>
#include <string>

#include "class_sketch_cuda.hpp"
#include "sketch_project_cuda.hpp"

namespace {

template <typename Call>
const char* told(const Call& call) {
  static std::string error;
  error.clear();
  try {
    call();
  } catch (const std::exception& caught) {
    error = caught.what();
  }
  return error.c_str();
}

}  // namespace

extern "C" {

std::int64_t on_host_class_sketch_workspace(int dtype, std::int64_t samples, std::int64_t positions, std::int64_t rows,
                                            std::int64_t columns) {
  return gradmix::class_sketch_cuda_workspace(static_cast<gradmix::Dtype>(dtype), samples, positions, rows, columns);
}

const char* on_host_class_sketch(int dtype, const void* deltas, const void* activations, const std::int64_t* order,
                                 const std::int64_t* labels, const std::int64_t* starts, void* sums, void* squares,
                                 void* workspace, std::int64_t samples, std::int64_t positions, std::int64_t rows,
                                 std::int64_t columns, std::int64_t classes) {
  return told([&] {
    gradmix::class_sketch_cuda({static_cast<gradmix::Dtype>(dtype), deltas, activations, order, labels, starts, sums,
                                squares, workspace, samples, positions, rows, columns, classes},
                               0, 0);
  });
}

std::int64_t on_host_sketch_project_workspace(int dtype, std::int64_t samples, std::int64_t positions, std::int64_t dim,
                                              std::int64_t rank) {
  return gradmix::sketch_project_cuda_workspace(static_cast<gradmix::Dtype>(dtype), samples, positions, dim, rank);
}

const char* on_host_sketch_project(int dtype, const void* x, std::int64_t stride0, std::int64_t stride1,
                                   std::int64_t stride2, void* out, void* workspace, std::int64_t samples,
                                   std::int64_t positions, std::int64_t dim, std::int64_t rank, std::int64_t key, int ones) {
  return told([&] {
    gradmix::sketch_project_cuda({static_cast<gradmix::Dtype>(dtype), x, {stride0, stride1, stride2}, out, workspace,
                                  samples, positions, dim, rank, key, ones != 0},
                                 0, 0);
  });
}
}
