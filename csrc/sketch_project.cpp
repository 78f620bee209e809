#include "sketch_project.hpp"

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "cpu_level.hpp"
#include "parallel.hpp"
#include "sketch_project_kernel.hpp"

namespace gradmix {
namespace {

namespace kernels = sketch_project_kernel;

constexpr std::int64_t kPieces = 8;              // as many are worth more than large ones
constexpr std::int64_t kLeastUnits = 4;          // of a piece: each draws the matrix anew
constexpr std::int64_t kSmallWork = 1 << 16;     // additions that are not worth waking threads for
constexpr std::align_val_t kAlignment{64};

bool in_rows(const SketchProject& p) { return p.column_stride == 1 || p.columns <= 1; }

struct Release {
  void operator()(void* memory) const { ::operator delete(memory, kAlignment); }
};

}  // namespace

bool sketch_project_takes(const SketchProject& p) { return in_rows(p) || p.position_stride == 1 || p.positions <= 1; }

void sketch_project(const SketchProject& p, int threads) {
  if (p.samples == 0 || p.positions == 0 || p.rank == 0) return;
  const bool planes = !in_rows(p);
  const std::int64_t units =
      planes ? p.samples * ((p.positions + kernels::kUnit - 1) / kernels::kUnit)
             : (p.samples * p.positions + kernels::kUnit - 1) / kernels::kUnit;
  const std::int64_t length = std::clamp((units + kPieces - 1) / kPieces, kLeastUnits, kernels::kMostUnits);
  const std::int64_t pieces = (units + length - 1) / length;
  // In floating point: of an expanded x the product may be beyond any memory, and beyond 64 bits.
  const double work = static_cast<double>(p.samples) * static_cast<double>(p.positions) *
                      static_cast<double>(p.columns + 1) / 4 * static_cast<double>(p.rank + 16);
  if (work < kSmallWork) threads = 1;
  threads = static_cast<int>(std::min<std::int64_t>(threads, pieces));

  const std::size_t item = p.dtype == Dtype::kFloat64 ? 8 : 4;
  const std::size_t scratch = kernels::kMostUnits * kernels::kUnit * kernels::kRankBlock * item;
  const std::unique_ptr<void, Release> memory(::operator new(scratch * static_cast<std::size_t>(threads), kAlignment));

  const kernels::Table& table = GRADMIX_KERNELS(kernels);
  void (*const project)(const kernels::Piece&) = p.dtype == Dtype::kFloat64    ? table.float64
                                                 : p.dtype == Dtype::kBfloat16 ? table.bfloat16
                                                 : p.dtype == Dtype::kFloat16  ? table.float16
                                                                               : table.float32;
  parallel_for(pieces, threads, [&](std::int64_t index, int thread) {
    kernels::Piece piece{};
    piece.x = p.x;
    piece.samples = p.samples;
    piece.positions = p.positions;
    piece.columns = p.columns;
    piece.sample_stride = p.sample_stride;
    piece.position_stride = p.position_stride;
    piece.column_stride = p.column_stride;
    piece.planes = planes;
    piece.ones = p.ones;
    piece.key = p.key;
    piece.rank = p.rank;
    piece.scale = 1.0 / std::sqrt(static_cast<double>(p.rank));
    piece.begin = index * length;
    piece.end = std::min(units, piece.begin + length);
    piece.out = p.out;
    piece.sums = static_cast<char*>(memory.get()) + static_cast<std::size_t>(thread) * scratch;
    project(piece);
  });
}

}  // namespace gradmix
