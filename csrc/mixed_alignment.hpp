// The operator mixed_alignment on the CPU: <g, G> and ||g|| of the last-layer gradients g of all mixtures of a sample of
// one side with a sample of the other. gradmix/ops/mixed_alignment.py has the formula.
#pragma once

#include <cstdint>

#include "dtype.hpp"

namespace gradmix {

// One side's samples; all arrays are contiguous, and of the problem's dtype but for the labels.
struct MixedSide {
  const void* features;        // (count, width)
  const void* logits;          // (count, classes)
  const std::int64_t* labels;  // (count,), each in [0, classes)
  const void* projected;       // (count, classes): U = [h; 1] G^T
  const void* beside;          // (count, classes): what label vectors lack to the one-hot vectors of `labels`; null: nothing
  std::int64_t count;
};

struct MixedAlignment {
  MixedSide a;
  MixedSide b;
  Dtype dtype;            // float32 or float64
  const void* reference;  // (classes, width) or, with a bias column, (classes, width + 1)
  const void* gram;       // (a.count, b.count) inner products of features; read where norms are wanted
  const void* toward;     // (a.count, b.count) <t, u> of the one's t with the other's u, and the other way round; and
  const void* beside;     // twice <t, t>; read where there is a t, and norms are wanted then
  const double* lams;     // (mixtures,) weights of the first side, in [0, 1]
  void* inner;            // (mixtures, a.count, b.count), overwritten
  void* norm;             // likewise; null: norms are not wanted
  std::int64_t mixtures;
  std::int64_t classes;
  std::int64_t width;
  bool bias;
  bool in_range;          // whether features and reference have been brought to a moderate size; the next three are then
  double features_unit;   // what features were divided by,
  double reference_unit;  // what the reference was divided by,
  double least;           // and the size at which residuals are held
};

// Computes, and returns true; or touches nothing and returns false where features or reference are not of moderate size
// and have not been brought there. The same bits for every number of threads.
bool mixed_alignment(const MixedAlignment& problem, int threads);

}  // namespace gradmix
