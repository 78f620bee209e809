// Whether the logits of a few samples are W h + b, up to rounding. gradmix/model/head_values.py says what it is for.
#pragma once

#include <cstdint>

namespace gradmix {

struct OffLinear {
  const float* features;  // (rows, width)
  const float* logits;    // (rows, classes)
  const float* weight;    // (classes, width)
  const float* bias;      // (classes,) or null
  std::int64_t rows;
  std::int64_t width;
  std::int64_t classes;
  std::int64_t step;      // every step-th row is looked at
  double tolerance;       // of a logit, relative to the sum of the magnitudes of its terms
};

// False where all of them are; true where any is not, or is no number. In double.
bool off_linear(const OffLinear& problem);

}  // namespace gradmix
