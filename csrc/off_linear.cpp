#include "off_linear.hpp"

#include <cmath>
#include <vector>

namespace gradmix {
namespace {

constexpr std::int64_t kLanes = 4;  // partial sums, which the compiler keeps in registers side by side

struct Sums {
  double product;
  double magnitude;  // of all terms
};

Sums dot(const double* h, const float* w, std::int64_t width) {
  double product[kLanes] = {}, magnitude[kLanes] = {};
  std::int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      const double term = h[k + lane] * static_cast<double>(w[k + lane]);
      product[lane] += term;
      magnitude[lane] += std::fabs(term);
    }
  }
  for (; k < width; ++k) {
    const double term = h[k] * static_cast<double>(w[k]);
    product[0] += term;
    magnitude[0] += std::fabs(term);
  }
  return {product[0] + product[1] + product[2] + product[3], magnitude[0] + magnitude[1] + magnitude[2] + magnitude[3]};
}

}  // namespace

bool off_linear(const OffLinear& p) {
  std::vector<double> samples;  // in double; all of them meet a row of the weight while it is at hand
  for (std::int64_t i = 0; i < p.rows; i += p.step) {
    samples.insert(samples.end(), p.features + i * p.width, p.features + (i + 1) * p.width);
  }
  for (std::int64_t c = 0; c < p.classes; ++c) {
    const double bias = p.bias == nullptr ? 0.0 : static_cast<double>(p.bias[c]);
    for (std::int64_t i = 0, n = 0; i < p.rows; i += p.step, ++n) {
      const Sums sums = dot(samples.data() + n * p.width, p.weight + c * p.width, p.width);
      const double error = std::fabs(sums.product + bias - static_cast<double>(p.logits[i * p.classes + c]));
      if (!(error <= p.tolerance * (sums.magnitude + std::fabs(bias)))) return true;
    }
  }
  return false;
}

}  // namespace gradmix
