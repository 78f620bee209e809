// Runs the CUDA bodies on small problems for a sanitizer to watch. Every buffer is as large as it must be and no larger, so
// that a step outside is seen; results are poisoned first, and must be the same bits in both orders of threads and blocks.
//
// With an argument it runs a kernel that is wrong on purpose, to see that the sanitizer would notice: "race" forgets a
// barrier, "outside" writes behind its memory, "torn" lets half of the threads skip a barrier.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "class_sketch_cuda.hpp"
#include "cuda_check.hpp"
#include "sketch_project_cuda.hpp"

namespace {

using gradmix::Dtype;

std::uint32_t state = 1;
std::uint32_t draw() { return state = state * 1664525u + 1013904223u; }

std::size_t itemsize(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

// Memory of exactly so many elements, 16-byte aligned or, with `odd`, one element off that.
class Memory {
 public:
  Memory(std::int64_t count, std::size_t size, bool odd = false)
      : bytes_(static_cast<std::size_t>(count) * size), raw_(static_cast<char*>(std::malloc(bytes_ + (odd ? size : 0)))),
        data_(raw_ + (odd ? size : 0)) {}
  ~Memory() { std::free(raw_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* get() const { return data_; }
  void poison() const { std::memset(data_, 0xff, bytes_); }  // NaN in every floating type
  std::string bits() const { return std::string(data_, bytes_); }

 private:
  std::size_t bytes_;
  char* raw_;
  char* data_;
};

void fill(const Memory& memory, std::int64_t count, Dtype dtype) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float value = static_cast<float>(draw() >> 8) * 0x1p-23f - 1.0f;
    if (dtype == Dtype::kFloat64) {
      static_cast<double*>(memory.get())[i] = value;
    } else if (dtype == Dtype::kFloat32) {
      static_cast<float*>(memory.get())[i] = value;
    } else {
      static_cast<std::uint16_t*>(memory.get())[i] = static_cast<std::uint16_t>(0x3c00u | (draw() >> 22));  // no NaN
    }
  }
}

int failures = 0;

void check(const std::string& name, const std::vector<const Memory*>& results, Dtype dtype, void (*run)(const void*),
           const void* argument) {
  std::vector<std::string> first;
  for (const char* order : {"forward", "backward"}) {
    setenv("GRADMIX_ORDER", order, 1);
    for (const Memory* result : results) result->poison();
    run(argument);
    for (std::size_t i = 0; i < results.size(); ++i) {
      const std::string bits = results[i]->bits();
      bool poisoned = false;
      const std::size_t size = dtype == Dtype::kFloat64 ? 8 : 4;
      for (std::size_t at = 0; at < bits.size(); at += size) {
        poisoned |= bits.compare(at, size, std::string(size, '\xff')) == 0;
      }
      if (poisoned || (order[0] == 'b' && bits != first[i])) {
        std::printf("%s: result %zu %s\n", name.c_str(), i, poisoned ? "is not all written" : "depends on the order");
        ++failures;
      }
      first.push_back(bits);
    }
  }
}

void class_sketch(Dtype dtype, std::int64_t n, std::int64_t t, std::int64_t k, std::int64_t j, std::int64_t p, bool odd) {
  const std::size_t size = itemsize(dtype), wide = dtype == Dtype::kFloat64 ? 8 : 4;
  const Memory deltas(n * t * k, size, odd), activations(n * t * j, size, odd);
  const Memory order(n, 8), labels(n, 8), starts(p + 1, 8), sums(p * k * j, wide), squares(p, wide);
  const Memory workspace(gradmix::class_sketch_cuda_workspace(dtype, n, t, k, j), wide);
  fill(deltas, n * t * k, dtype);
  fill(activations, n * t * j, dtype);
  auto* const begin = static_cast<std::int64_t*>(starts.get());
  std::vector<std::int64_t> of(static_cast<std::size_t>(n));
  for (auto& label : of) label = draw() >> 8 & 1 ? 0 : (draw() >> 8) % p;
  std::int64_t at = 0;
  for (std::int64_t c = 0; c < p; ++c) {
    begin[c] = at;
    for (std::int64_t i = 0; i < n; ++i) {
      if (of[static_cast<std::size_t>(i)] != c) continue;
      static_cast<std::int64_t*>(order.get())[at] = i;
      static_cast<std::int64_t*>(labels.get())[at++] = c;
    }
  }
  begin[p] = at;
  workspace.poison();
  const gradmix::ClassSketchCuda problem = {
      dtype, deltas.get(), activations.get(), static_cast<std::int64_t*>(order.get()),
      static_cast<std::int64_t*>(labels.get()), begin, sums.get(), squares.get(), workspace.get(), n, t, k, j, p};
  check("class_sketch " + std::to_string(n) + " " + std::to_string(t) + " " + std::to_string(k) + " " + std::to_string(j),
        {&sums, &squares}, dtype,
        [](const void* argument) { class_sketch_cuda(*static_cast<const gradmix::ClassSketchCuda*>(argument), 0, 0); },
        &problem);
}

void sketch_project(Dtype dtype, bool planes, std::int64_t n, std::int64_t t, std::int64_t d, std::int64_t rank, bool odd) {
  const std::size_t size = itemsize(dtype), wide = dtype == Dtype::kFloat64 ? 8 : 4;
  const Memory x(n * t * d, size, odd), out(n * t * rank, wide);
  const Memory workspace(gradmix::sketch_project_cuda_workspace(dtype, n, t, d, rank), wide);
  fill(x, n * t * d, dtype);
  workspace.poison();
  const gradmix::SketchProjectCuda problem = {dtype, x.get(), {t * d, planes ? 1 : d, planes ? t : 1}, out.get(),
                                              workspace.get(), n, t, d, rank, 12345, true};
  check("sketch_project " + std::to_string(n) + " " + std::to_string(t) + " " + std::to_string(d) + " " +
            std::to_string(rank),
        {&out}, dtype,
        [](const void* argument) {
          sketch_project_cuda(*static_cast<const gradmix::SketchProjectCuda*>(argument), 0, 0);
        },
        &problem);
}

struct Wrong {
  int* out;
  int kind;
};
std::string describe(const Wrong&) { return "on purpose"; }

__global__ void wrong_kernel(Wrong p) {
  __shared__ int values[64];
  const int thread = static_cast<int>(threadIdx.x);
  values[thread] = thread;
  if (p.kind != 0 && !(p.kind == 2 && thread >= 32)) __syncthreads();
  p.out[thread + (p.kind == 1 ? 1 : 0)] = values[63 - thread];
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) {
    const std::string kind = arguments[1];
    const Memory out(64, 4);
    gradmix::launch("wrong", wrong_kernel, {1, 1}, 64, nullptr,
                    Wrong{static_cast<int*>(out.get()), kind == "race" ? 0 : kind == "outside" ? 1 : 2});
    return 0;
  }
  const Dtype f16 = Dtype::kFloat16, bf16 = Dtype::kBfloat16, f32 = Dtype::kFloat32, f64 = Dtype::kFloat64;
  class_sketch(f32, 7, 5, 13, 19, 3, false);     // tile 32, odd sizes
  class_sketch(f32, 5, 65, 16, 12, 3, false);    // tile 16, packed, several reads a sample
  class_sketch(f32, 3, 20, 36, 8, 5, true);      // tile 64, one element off alignment
  class_sketch(f32, 40, 1, 9, 16, 4, false);     // one position, classes across blocks
  class_sketch(f32, 2, 520, 8, 8, 2, false);     // positions cut
  class_sketch(bf16, 4, 3, 20, 20, 3, false);
  class_sketch(f16, 4, 3, 5, 8, 3, true);
  class_sketch(f64, 5, 33, 8, 20, 2, false);
  sketch_project(f32, false, 3, 50, 37, 5, false);  // odd D
  sketch_project(f32, false, 2, 3, 260, 20, false);  // D cut, packed
  sketch_project(f32, true, 3, 49, 18, 40, false);   // odd T, rank of a third kind
  sketch_project(f32, true, 2, 68, 19, 16, false);   // packed planes
  sketch_project(f32, true, 1, 132, 9, 70, true);    // one element off alignment, two blocks of rows
  sketch_project(bf16, true, 2, 72, 33, 16, false);
  sketch_project(f16, false, 2, 9, 40, 33, false);
  sketch_project(f64, false, 2, 9, 21, 20, false);   // two blocks of rows that share a word
  sketch_project(f64, true, 2, 10, 9, 3, true);
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
