// The operator mix_samples on the CPU: lam x_i + (1 - lam) of each sample's partner. gradmix/ops/mix_samples.py has the rule.
#pragma once

#include <cstdint>

#include "dtype.hpp"

namespace gradmix {

struct MixSamples {
  const void* own;              // (rows, width)
  const void* other;            // (others, width)
  const std::int64_t* partner;  // (rows,), each in [0, others)
  const void* lam;              // (rows,), weights of `own`
  void* out;                    // (rows, width), overwritten
  Dtype dtype;                  // of all but `partner`: float32 or float64
  std::int64_t rows;
  std::int64_t width;
};

// Each product and the sum are rounded as torch rounds them: the same bits as lam * own + (1 - lam) * other[partner].
void mix_samples(const MixSamples& problem, int threads);

}  // namespace gradmix
