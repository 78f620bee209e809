#include "mix_samples.hpp"

#include <algorithm>

#include "parallel.hpp"

namespace gradmix {
namespace {

constexpr std::int64_t kEntriesOfPiece = 1 << 15;  // fewer are not worth waking threads for

template <typename T>
void mix(const MixSamples& p, int threads) {
  const std::int64_t rows = std::max<std::int64_t>(1, kEntriesOfPiece / std::max<std::int64_t>(1, p.width));
  parallel_for((p.rows + rows - 1) / rows, threads, [&](std::int64_t piece, int) {
    for (std::int64_t i = piece * rows; i < std::min(p.rows, (piece + 1) * rows); ++i) {
      const T* const own = static_cast<const T*>(p.own) + i * p.width;
      const T* const other = static_cast<const T*>(p.other) + p.partner[i] * p.width;
      T* const out = static_cast<T*>(p.out) + i * p.width;
      const T lam = static_cast<const T*>(p.lam)[i], rest = T(1) - lam;
      for (std::int64_t k = 0; k < p.width; ++k) out[k] = lam * own[k] + rest * other[k];
    }
  });
}

}  // namespace

void mix_samples(const MixSamples& problem, int threads) {
  problem.dtype == Dtype::kFloat64 ? mix<double>(problem, threads) : mix<float>(problem, threads);
}

}  // namespace gradmix
