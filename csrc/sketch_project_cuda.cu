// See sketch_project_cuda.hpp.
//
// A matrix product whose right side is never read: a block takes 128 positions and up to 32 rows of M, and goes along D.
// For some columns at a time it lays x, converted, and the signs of M side by side in shared memory, each thread multiplies
// a small square of them in registers, and the next columns of x are on their way meanwhile. One Philox call gives the
// signs of 4 columns for 32 rows; they are drawn once for 64 columns, by the block.
//
// Where there are few positions, D is cut and a second kernel adds the pieces in order. A rank above 32 is made of several
// blocks that run side by side, so that all but one find x in the second-level cache. Blocks of 64 rows (8 x 8 results a
// thread) take up to 250 registers and most of the compiler's time; whether they are faster is for a GPU to say.
//
// What it must do at the least: read N T D elements, write N T rank results and do 2 N T D rank operations, that is rank / 2
// operations a byte of float32, not counting what is written. A GPU of 3.3 TB/s and 60 Tflop/s in float32 does
// 18: memory is the floor up to rank 32, arithmetic beyond. N T = 256 * 784, D = 512, rank 16: 424 MB, 128 us. In bfloat16
// the same reads half as much and arithmetic is the floor from rank 16 on; only matrix instructions would lower it.
#include "sketch_project_cuda.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <type_traits>

#include "counter_random.hpp"
#include "cuda_check.hpp"
#include "cuda_elements.hpp"

namespace gradmix {
namespace {

constexpr int kThreads = 128;
constexpr int kTile = 128;  // positions of a block; as many as threads, so that each may read a position of its own
constexpr int kSpan = 64;   // columns whose signs are drawn at a time; a piece of D is a multiple of them
constexpr int kGroupsOfSpan = kSpan / 4;
constexpr std::int64_t kWidestRank = kRademacherRows;  // of a block: its signs come out of one word a column

struct Projection {
  const void* x;
  void* out;      // or, if D is cut, the pieces (splits, samples * positions, rank)
  std::int64_t stride[3];
  std::int64_t total;  // positions of all samples
  std::int64_t positions;
  std::int64_t dim;
  std::int64_t rank;
  std::int64_t key;
  std::int64_t splits;
  std::int64_t length;  // columns of a piece
  std::int64_t rank_blocks;
  double scale;
  bool ones;
  bool packed;  // x may be read 16 bytes at a time
  bool bfloat;
};

std::string describe(const Projection& p) {
  return "positions=" + std::to_string(p.total) + " D=" + std::to_string(p.dim) + " rank=" + std::to_string(p.rank);
}

template <typename In, typename T, bool Planes, int Rank, int MicroT, int MicroR>
__global__ __launch_bounds__(kThreads, 3) void project_kernel(Projection p) {
  constexpr int kPacked = 16 / static_cast<int>(sizeof(In));  // elements of a packed read
  constexpr int kReads = 4;                                   // packed reads of a thread at a time
  constexpr int kDepth = kReads * kPacked;                    // columns at a time: 64 bytes of a row
  constexpr int kRowThreads = Rank / MicroR;
  constexpr int kPositionThreads = kTile / MicroT;
  static_assert(kRowThreads * kPositionThreads == kThreads && kSpan % kDepth == 0, "tile");
  static_assert(MicroT % 4 == 0 && MicroR % 4 == 0, "read four at a time");
  static_assert(kRademacherRows % Rank == 0, "the rows of a block share a word");
  constexpr int kPadded = kTile + 4;  // else rows would all be written to one bank

  __shared__ Pack<T, 4> x_tile[kDepth][kPadded / 4];
  __shared__ Pack<T, 4> signs[kDepth][Rank / 4];
  __shared__ std::uint32_t words[kSpan];

  const int thread = static_cast<int>(threadIdx.x);
  const int row_thread = thread % kRowThreads;
  const int position_thread = thread / kRowThreads;
  const std::int64_t first_position = static_cast<std::int64_t>(blockIdx.x) / p.rank_blocks * kTile;
  const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.x) % p.rank_blocks * Rank;
  const int first_bit = static_cast<int>(first_row % kRademacherRows);
  const std::int64_t first_column = static_cast<std::int64_t>(blockIdx.y) * p.length;
  const std::int64_t end_column = first_column + p.length < p.dim ? first_column + p.length : p.dim;

  // Packed reads go along the axis that is contiguous. Where that is not aligned, a thread reads a position of its own: in
  // planes, neighbours again; in rows, 64 bytes of its own line. `own` are the positions of this thread's reads.
  constexpr int kOwn = Planes ? 1 : kReads;
  const std::int64_t step = p.stride[2];
  const In* own[kOwn];  // null behind the last position
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int packed_at = Planes ? thread % (kTile / kPacked) * kPacked : thread / kReads + i * (kTile / kReads);
    const int at = p.packed ? packed_at : thread;
    const std::int64_t position = first_position + at;
    own[i] = nullptr;
    if (position < p.total) {
      own[i] = static_cast<const In*>(p.x) + position / p.positions * p.stride[0] + position % p.positions * p.stride[1];
    }
  }
  using Packed = Pack<In, kPacked>;
  Packed staged[kReads];
  const auto fetch = [&](std::int64_t column) {
#pragma unroll
    for (int i = 0; i < kReads; ++i) {
      staged[i] = Packed{};
      if (p.packed && Planes) {
        const std::int64_t j = column + thread / (kTile / kPacked) + i * (kDepth / kReads);
        if (own[0] != nullptr && j < end_column) staged[i] = *reinterpret_cast<const Packed*>(own[0] + j * step);
      } else {
        const std::int64_t j = column + (p.packed ? thread % kReads : i) * kPacked;
        const In* const from = p.packed ? own[i % kOwn] : own[0];
        if (from != nullptr && p.packed && j + kPacked <= end_column) {
          staged[i] = *reinterpret_cast<const Packed*>(from + j);
        } else if (from != nullptr) {
#pragma unroll
          for (int c = 0; c < kPacked; ++c) {
            if (j + c < end_column) staged[i].at[c] = from[(j + c) * step];
          }
        }
      }
    }
  };
  const auto lay = [&] {
    if (Planes && p.packed) {
      constexpr int kOnce = kPacked < 4 ? kPacked : 4;
      const int at = thread % (kTile / kPacked) * kPacked;
#pragma unroll
      for (int i = 0; i < kReads; ++i) {
        const int column = thread / (kTile / kPacked) + i * (kDepth / kReads);
#pragma unroll
        for (int c = 0; c < kPacked; c += kOnce) {
          Pack<T, kOnce> some;
#pragma unroll
          for (int e = 0; e < kOnce; ++e) some.at[e] = widen<T>(staged[i].at[c + e], p.bfloat);
          *reinterpret_cast<Pack<T, kOnce>*>(&x_tile[column][at / 4 + c / 4].at[at % 4 + c % 4]) = some;
        }
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kReads; ++i) {
#pragma unroll
      for (int c = 0; c < kPacked; ++c) {
        const int column = p.packed ? thread % kReads * kPacked + c : i * kPacked + c;
        const int at = p.packed ? thread / kReads + i * (kTile / kReads) : thread;
        x_tile[column][at / 4].at[at % 4] = widen<T>(staged[i].at[c], p.bfloat);
      }
    }
  };

  T sum[MicroT][MicroR];
#pragma unroll
  for (int t = 0; t < MicroT; ++t) {
#pragma unroll
    for (int r = 0; r < MicroR; ++r) sum[t][r] = 0;
  }

  if (first_column < end_column) fetch(first_column);
  for (std::int64_t column = first_column; column < end_column; column += kDepth) {
    const int in_span = static_cast<int>((column - first_column) % kSpan);
    if (in_span == 0) {
      // The words drawn before were last read ahead of the barrier that ended the last columns' signs.
      if (thread < kGroupsOfSpan) {
        const RandomWords drawn = random_words(column / 4 + thread, static_cast<std::uint32_t>(first_row / kRademacherRows),
                                               kRademacherStream, p.key);
#pragma unroll
        for (int c = 0; c < 4; ++c) words[4 * thread + c] = drawn.word[c];
      }
      __syncthreads();
    }
    lay();
#pragma unroll
    for (int i = 0; i < Rank * kDepth / kThreads; ++i) {
      const int element = thread + i * kThreads;
      const int row = element % Rank;
      const std::uint32_t word = words[in_span + element / Rank];
      signs[element / Rank][row / 4].at[row % 4] = (word >> (first_bit + row) & 1u) != 0 ? T(1) : T(-1);
    }
    __syncthreads();
    if (column + kDepth < end_column) fetch(column + kDepth);
#pragma unroll 4
    for (int j = 0; j < kDepth; ++j) {
      Pack<T, 4> some[MicroT / 4], sign[MicroR / 4];
#pragma unroll
      for (int t = 0; t < MicroT / 4; ++t) some[t] = x_tile[j][t * kPositionThreads + position_thread];
#pragma unroll
      for (int r = 0; r < MicroR / 4; ++r) sign[r] = signs[j][r * kRowThreads + row_thread];
#pragma unroll
      for (int t = 0; t < MicroT; ++t) {
#pragma unroll
        for (int r = 0; r < MicroR; ++r) sum[t][r] += some[t / 4].at[t % 4] * sign[r / 4].at[r % 4];
      }
    }
    __syncthreads();  // everybody has read the tiles
  }

  const T scale = p.splits > 1 ? T(1) : static_cast<T>(p.scale);
  T* const out = static_cast<T*>(p.out) + static_cast<std::int64_t>(blockIdx.y) * p.total * p.rank;
#pragma unroll
  for (int r = 0; r < MicroR; r += 4) {
    const std::int64_t row = first_row + r * kRowThreads + row_thread * 4;
    T last[4] = {0, 0, 0, 0};  // the column of ones
    if (p.ones && blockIdx.y == 0) {
      const RandomWords drawn = random_words(p.dim / 4, static_cast<std::uint32_t>(row / kRademacherRows),
                                             kRademacherStream, p.key);
      const int of_four = static_cast<int>(p.dim % 4);
      const std::uint32_t word = of_four == 0   ? drawn.word[0]
                                 : of_four == 1 ? drawn.word[1]
                                 : of_four == 2 ? drawn.word[2]
                                                : drawn.word[3];
#pragma unroll
      for (int c = 0; c < 4; ++c) last[c] = (word >> ((row + c) % kRademacherRows) & 1u) != 0 ? T(1) : T(-1);
    }
#pragma unroll
    for (int t = 0; t < MicroT; ++t) {
      const std::int64_t position = first_position + t / 4 * (4 * kPositionThreads) + position_thread * 4 + t % 4;
      if (position >= p.total) continue;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (row + c < p.rank) out[position * p.rank + row + c] = (sum[t][r + c] + last[c]) * scale;
      }
    }
  }
}

struct Combination {
  const void* pieces;  // (splits, count)
  void* out;           // (count,)
  std::int64_t count;
  std::int64_t splits;
  double scale;
};

std::string describe(const Combination& p) {
  return "results=" + std::to_string(p.count) + " pieces=" + std::to_string(p.splits);
}

template <typename T>
__global__ __launch_bounds__(kThreads) void combine_kernel(Combination p) {
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (at >= p.count) return;
  const T* const pieces = static_cast<const T*>(p.pieces);
  T sum = 0;
#pragma unroll 4
  for (std::int64_t s = 0; s < p.splits; ++s) sum += pieces[s * p.count + at];
  static_cast<T*>(p.out)[at] = sum * static_cast<T>(p.scale);
}

// How the work is cut: by the sizes alone, so that the order of additions is the same on every device.
struct Plan {
  std::int64_t rank;  // of a block
  std::int64_t tiles, rank_blocks;
  std::int64_t splits, length;
};

constexpr std::int64_t kEnoughBlocks = 512;
constexpr std::int64_t kLeastOfSplit = 2 * kSpan;  // columns of a piece

std::int64_t up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

Plan plan(Dtype dtype, std::int64_t samples, std::int64_t positions, std::int64_t dim, std::int64_t rank) {
  Plan p = {};
  p.rank = dtype == Dtype::kFloat64 || rank <= 16 ? 16 : kWidestRank;
  p.tiles = up(samples * positions, kTile);
  p.rank_blocks = up(rank, p.rank);
  p.splits = 1;
  p.length = std::max<std::int64_t>(dim, 1);
  const std::int64_t blocks = p.tiles * p.rank_blocks;
  if (blocks > 0 && blocks * 2 <= kEnoughBlocks && dim >= 2 * kLeastOfSplit) {
    const std::int64_t wanted = std::min(kEnoughBlocks / blocks, dim / kLeastOfSplit);
    p.length = up(up(dim, wanted), kSpan) * kSpan;
    p.splits = up(dim, p.length);  // none of them empty
  }
  return p;
}

template <typename In, typename T, int Rank, int MicroT, int MicroR>
void launch_project(bool planes, const Grid& grid, cudaStream_t stream, const Projection& p) {
  if (planes) {
    launch("sketch_project planes", project_kernel<In, T, true, Rank, MicroT, MicroR>, grid, kThreads, stream, p);
  } else {
    launch("sketch_project rows", project_kernel<In, T, false, Rank, MicroT, MicroR>, grid, kThreads, stream, p);
  }
}

template <typename In, typename T>
void run(const SketchProjectCuda& problem, cudaStream_t stream) {
  const Plan cut = plan(problem.dtype, problem.samples, problem.positions, problem.dim, problem.rank);
  Projection p = {};
  p.x = problem.x;
  p.out = cut.splits > 1 ? problem.workspace : problem.out;
  for (int axis = 0; axis < 3; ++axis) p.stride[axis] = problem.stride[axis];
  p.total = problem.samples * problem.positions;
  p.positions = problem.positions;
  p.dim = problem.dim;
  p.rank = problem.rank;
  p.key = problem.key;
  p.splits = cut.splits;
  p.length = cut.length;
  p.rank_blocks = cut.rank_blocks;
  p.scale = 1.0 / std::sqrt(static_cast<double>(problem.rank));
  p.ones = problem.ones;
  p.bfloat = problem.dtype == Dtype::kBfloat16;
  if (p.total == 0 || p.rank == 0) return;

  // An axis of one entry is never stepped along.
  const bool rows = problem.dim <= 1 || p.stride[2] == 1;
  constexpr std::int64_t packed = 16 / static_cast<std::int64_t>(sizeof(In));
  const auto steps_packed = [&](int axis, std::int64_t size) { return size <= 1 || p.stride[axis] % packed == 0; };
  p.packed = aligned_to(p.x, 16) && steps_packed(0, problem.samples) &&
             (rows ? steps_packed(1, p.positions) : steps_packed(2, p.dim) && p.positions % packed == 0);

  const Grid grid = {cut.tiles * cut.rank_blocks, cut.splits};
  if constexpr (std::is_same_v<T, double>) {
    launch_project<In, T, 16, 4, 4>(!rows, grid, stream, p);
  } else if (cut.rank == 16) {
    launch_project<In, T, 16, 4, 4>(!rows, grid, stream, p);
  } else {
    launch_project<In, T, 32, 8, 4>(!rows, grid, stream, p);
  }
  if (cut.splits > 1) {
    const Combination c = {problem.workspace, problem.out, p.total * p.rank, cut.splits, p.scale};
    launch("sketch_project combine", combine_kernel<T>, {up(c.count, kThreads), 1}, kThreads, stream, c);
  }
}

}  // namespace

std::int64_t sketch_project_cuda_workspace(Dtype dtype, std::int64_t samples, std::int64_t positions, std::int64_t dim,
                                           std::int64_t rank) {
  const Plan cut = plan(dtype, samples, positions, dim, rank);
  return cut.splits > 1 ? cut.splits * samples * positions * rank : 0;
}

void sketch_project_cuda(const SketchProjectCuda& problem, int device, std::uintptr_t stream) {
  const DeviceScope scope(device);
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  switch (problem.dtype) {
    case Dtype::kFloat32: return run<float, float>(problem, queue);
    case Dtype::kFloat64: return run<double, double>(problem, queue);
    case Dtype::kBfloat16:
    case Dtype::kFloat16: return run<Half, float>(problem, queue);
    case Dtype::kUint8:
    case Dtype::kInt64: return;  // refused where the arguments are read
  }
}

}  // namespace gradmix
