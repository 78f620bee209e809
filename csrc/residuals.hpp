// The residuals softmax(z) - y of samples with class labels, on the CPU. gradmix/ops/last_layer_gradient.py has the formula.
#pragma once

#include <cstdint>

#include "dtype.hpp"

namespace gradmix {

struct Residuals {
  const void* logits;          // (rows, classes)
  const std::int64_t* labels;  // (rows,), each in [0, classes)
  void* out;                   // (rows, classes), overwritten
  Dtype dtype;                 // of both: float32 or float64
  std::int64_t rows;
  std::int64_t classes;
};

// In double inside. The residual at the label is minus the sum of the others, which does not cancel in fitted samples.
void residuals(const Residuals& problem, int threads);

}  // namespace gradmix
