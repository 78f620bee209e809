#include "residuals.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu_level.hpp"
#include "mixed_alignment_kernel.hpp"
#include "parallel.hpp"

namespace gradmix {
namespace {

namespace kernels = mixed_alignment_kernel;

constexpr std::int64_t kEntriesOfPiece = 1 << 14;  // fewer are not worth waking threads for

// One sample; e (classes,) is overwritten.
template <typename T>
void residual(const kernels::Functions<T>& kernel, const T* z, std::int64_t label, std::int64_t classes, double* e, T* out) {
  T top = -std::numeric_limits<T>::infinity();
  for (std::int64_t c = 0; c < label; ++c) top = std::max(top, z[c]);
  for (std::int64_t c = label + 1; c < classes; ++c) top = std::max(top, z[c]);
  if (top == -std::numeric_limits<T>::infinity()) top = 0;  // no other class is there
  kernel.exponentials(z, static_cast<double>(top), 1.0, classes, e);
  // Of a logit far above the others' the exponential is infinite, and their shares are 0; the logit itself must be finite.
  const double own = z[label] == std::numeric_limits<T>::infinity() ? std::nan("") : e[label];
  double others = 0;
  e[label] = 0;
  for (std::int64_t c = 0; c < classes; ++c) others += e[c];
  const double share = others == 0 && !std::isnan(own) ? 0.0 : 1 / (others + own);
  for (std::int64_t c = 0; c < classes; ++c) out[c] = static_cast<T>(e[c] * share);
  out[label] = static_cast<T>(-others * share);
}

template <typename T>
void all_residuals(const kernels::Functions<T>& kernel, const Residuals& p, int threads) {
  const std::int64_t rows = std::max<std::int64_t>(1, kEntriesOfPiece / p.classes);
  std::vector<double> scratch(static_cast<std::size_t>(threads * p.classes));
  parallel_for((p.rows + rows - 1) / rows, threads, [&](std::int64_t piece, int thread) {
    for (std::int64_t i = piece * rows; i < std::min(p.rows, (piece + 1) * rows); ++i) {
      residual(kernel, static_cast<const T*>(p.logits) + i * p.classes, p.labels[i], p.classes,
               scratch.data() + thread * p.classes, static_cast<T*>(p.out) + i * p.classes);
    }
  });
}

}  // namespace

void residuals(const Residuals& problem, int threads) {
  const kernels::Table& table = GRADMIX_KERNELS(kernels);
  problem.dtype == Dtype::kFloat64 ? all_residuals(table.float64, problem, threads)
                                   : all_residuals(table.float32, problem, threads);
}

}  // namespace gradmix
