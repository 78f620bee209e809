// See class_sketch_cuda.hpp.
//
// A block takes some samples next to each other in the order of classes, and one tile of the (rows x columns) output. It
// reads its samples' rows once, keeps the sum of the class it is in, and where a class ends writes that sum: into the output
// if the whole class was the block's own, else into a partial sum, which a second kernel adds in order.
//
// With several positions a sample, its own product has to exist for a moment, for its square; it does so in registers.
// With one position |d a^T|^2 is |d|^2 |a|^2, and the samples of a class are summed like positions.
//
// What it must do at the least: read N T (K + J) elements and do 2 N T K J operations, which for K, J <= 64 is at most 16
// operations a byte in float32. A GPU of 3.3 TB/s and 60 Tflop/s in float32 can do 18, so memory is the floor:
// N = 256, T = 784, K = J = 16 reads 25.7 MB, 8 us; N = 256, T = 49, K = J = 64 reads 6.4 MB, 2 us, and there the launches
// (two or three) are the longer part.
#include "class_sketch_cuda.hpp"

#include <algorithm>
#include <string>
#include <type_traits>

#include "cuda_check.hpp"
#include "cuda_elements.hpp"

namespace gradmix {
namespace {

constexpr int kThreads = 128;
constexpr std::int64_t kMergedElements = 1024;  // of the output, by one block of the second kernels

struct Products {
  const void* deltas;
  const void* activations;
  const std::int64_t* order;
  const std::int64_t* labels;
  const std::int64_t* starts;
  void* sums;
  void* squares;
  void* partial;  // (2 * chunks, rows, columns): each chunk's sum of the class it begins in, then of the one it ends in
  void* weights;  // (weight_sets, samples): pieces of each sample's squared norm
  void* pieces;   // (samples, splits, rows, columns), if splits > 1
  std::int64_t samples;
  std::int64_t positions;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t classes;
  std::int64_t chunk;         // samples of one block
  std::int64_t tiles;         // of the output
  std::int64_t column_tiles;  // in a row of them
  std::int64_t merged;        // blocks of kMergedElements in the output
  std::int64_t weight_sets;
  std::int64_t splits;  // pieces that the positions of one sample are cut into
  bool packed_deltas;   // rows may be read four elements at a time
  bool packed_activations;
  bool bfloat;
};

std::string describe(const Products& p) {
  return "N=" + std::to_string(p.samples) + " T=" + std::to_string(p.positions) + " K=" + std::to_string(p.rows) +
         " J=" + std::to_string(p.columns) + " P=" + std::to_string(p.classes);
}

// Where the sum of the samples of class `label` from `first` on belongs, which is all that this chunk has of the class.
template <typename T>
__device__ __forceinline__ T* destination(const Products& p, std::int64_t label, std::int64_t first_of_chunk) {
  const std::int64_t begin = p.starts[label], end = p.starts[label + 1];
  const std::int64_t area = p.rows * p.columns;
  if (begin >= first_of_chunk && end <= first_of_chunk + p.chunk) return static_cast<T*>(p.sums) + label * area;
  const std::int64_t slot = first_of_chunk / p.chunk * 2 + (begin >= first_of_chunk ? 1 : 0);
  return static_cast<T*>(p.partial) + slot * area;
}

// Four elements of a row from `column` on; zero behind the row's end.
template <typename T, typename In>
__device__ __forceinline__ Pack<T, 4> read_four(const In* row, std::int64_t column, std::int64_t width, bool packed,
                                                bool bfloat) {
  Pack<T, 4> result;
  if (packed && column + 4 <= width) {
    constexpr int kOnce = sizeof(In) > 4 ? 2 : 4;  // at most 16 bytes
#pragma unroll
    for (int i = 0; i < 4; i += kOnce) {
      const Pack<In, kOnce> some = *reinterpret_cast<const Pack<In, kOnce>*>(row + column + i);
#pragma unroll
      for (int c = 0; c < kOnce; ++c) result.at[i + c] = widen<T>(some.at[c], bfloat);
    }
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c) result.at[c] = column + c < width ? widen<T>(row[column + c], bfloat) : T(0);
  }
  return result;
}

// Tile x Tile of the output by kThreads threads, in groups that share out the positions read at a time. A thread computes
// MicroK x MicroJ of it.
template <typename In, typename T, int Tile, int MicroK, int MicroJ, int Depth>
struct Shape {
  static constexpr int kAcross = Tile / MicroJ;
  static constexpr int kOfTile = Tile / MicroK * kAcross;  // threads of a group
  static constexpr int kGroups = kThreads / kOfTile;
  static constexpr int kOwned = Tile * Tile / kThreads;  // outputs that a thread keeps the sums of
  static constexpr int kQuads = Depth * Tile / 4 / kThreads;  // that a thread reads of either input at a time
  static_assert(kThreads % kOfTile == 0 && Depth % kGroups == 0 && Depth * Tile % (4 * kThreads) == 0, "tile");
  static_assert(MicroK % 4 == 0 && MicroJ % 4 == 0, "read four at a time");
};

// Three blocks a multiprocessor at the least: what one waits for, the others hide.
template <typename In, typename T, int Tile, int MicroK, int MicroJ, int Depth>
__global__ __launch_bounds__(kThreads, 3) void products_kernel(Products p) {
  using S = Shape<In, T, Tile, MicroK, MicroJ, Depth>;
  __shared__ Pack<T, 4> deltas_tile[Depth][Tile / 4];
  __shared__ Pack<T, 4> activations_tile[Depth][Tile / 4];
  __shared__ T group_sums[S::kGroups > 1 ? S::kGroups : 1][S::kGroups > 1 ? Tile * Tile : 1];
  __shared__ T warp_sums[kThreads / 32];

  const int thread = static_cast<int>(threadIdx.x);
  const int group = thread / S::kOfTile;
  const int k_own = thread % S::kOfTile / S::kAcross * MicroK;
  const int j_own = thread % S::kAcross * MicroJ;
  // The tiles of the same samples are next to each other: what one has read, the others find in the second-level cache.
  const std::int64_t tile = static_cast<std::int64_t>(blockIdx.x) % p.tiles;
  const std::int64_t k_first = tile / p.column_tiles * Tile;
  const std::int64_t j_first = tile % p.column_tiles * Tile;

  // The block's samples, in the order of classes, and its positions of each.
  const std::int64_t first_of_chunk = static_cast<std::int64_t>(blockIdx.x) / p.tiles * p.chunk;
  std::int64_t sample = first_of_chunk;
  std::int64_t last = first_of_chunk + p.chunk;
  if (sample < p.starts[0]) sample = p.starts[0];
  if (last > p.starts[p.classes]) last = p.starts[p.classes];
  if (sample >= last) return;
  const bool single = p.positions == 1;
  const std::int64_t length = (p.positions + p.splits - 1) / p.splits;
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.y) * length;
  const std::int64_t end = begin + length < p.positions ? begin + length : p.positions;

  // A stretch is what one product is summed over: the positions of a sample, or all samples of a class if each has one.
  const auto stretch_size = [&](std::int64_t at) {
    if (!single) return end > begin ? end - begin : 0;
    const std::int64_t next_class = p.starts[p.labels[at] + 1];
    return (next_class < last ? next_class : last) - at;
  };

  Pack<T, 4> staged_deltas[S::kQuads], staged_activations[S::kQuads];
  const auto fetch = [&](std::int64_t stretch, std::int64_t offset, std::int64_t count) {
#pragma unroll
    for (int i = 0; i < S::kQuads; ++i) {
      const int quad = thread + i * kThreads;
      const int r = quad / (Tile / 4);
      const int column = quad % (Tile / 4) * 4;
      const Pack<T, 4> none = {};
      staged_deltas[i] = none;
      staged_activations[i] = none;
      if (r < count) {
        const std::int64_t row = single ? p.order[stretch + offset + r]
                                        : p.order[stretch] * p.positions + begin + offset + r;
        staged_deltas[i] = read_four<T>(static_cast<const In*>(p.deltas) + row * p.rows, k_first + column, p.rows,
                                        p.packed_deltas, p.bfloat);
        staged_activations[i] = read_four<T>(static_cast<const In*>(p.activations) + row * p.columns, j_first + column,
                                             p.columns, p.packed_activations, p.bfloat);
      }
    }
  };

  T product[MicroK][MicroJ];
  T owned[S::kOwned];
#pragma unroll
  for (int e = 0; e < S::kOwned; ++e) owned[e] = 0;
#pragma unroll
  for (int k = 0; k < MicroK; ++k) {
#pragma unroll
    for (int j = 0; j < MicroJ; ++j) product[k][j] = 0;
  }

  std::int64_t size = stretch_size(sample);
  std::int64_t offset = 0;
  fetch(sample, 0, size < Depth ? size : Depth);
  while (true) {
#pragma unroll
    for (int i = 0; i < S::kQuads; ++i) {
      const int quad = thread + i * kThreads;
      deltas_tile[quad / (Tile / 4)][quad % (Tile / 4)] = staged_deltas[i];
      activations_tile[quad / (Tile / 4)][quad % (Tile / 4)] = staged_activations[i];
    }
    __syncthreads();

    // What comes next is on its way while this is multiplied.
    const bool stretch_ends = offset + Depth >= size;
    const std::int64_t next_sample = !stretch_ends ? sample : sample + (single ? size : 1);
    const std::int64_t next_offset = stretch_ends ? 0 : offset + Depth;
    const std::int64_t next_size = !stretch_ends ? size : next_sample < last ? stretch_size(next_sample) : 0;
    if (next_sample < last) {
      fetch(next_sample, next_offset, next_size - next_offset < Depth ? next_size - next_offset : Depth);
    }

#pragma unroll 2
    for (int r = group; r < Depth; r += S::kGroups) {
      Pack<T, 4> d[MicroK / 4], a[MicroJ / 4];
#pragma unroll
      for (int k = 0; k < MicroK / 4; ++k) d[k] = deltas_tile[r][k_own / 4 + k];
#pragma unroll
      for (int j = 0; j < MicroJ / 4; ++j) a[j] = activations_tile[r][j_own / 4 + j];
#pragma unroll
      for (int k = 0; k < MicroK; ++k) {
#pragma unroll
        for (int j = 0; j < MicroJ; ++j) product[k][j] += d[k / 4].at[k % 4] * a[j / 4].at[j % 4];
      }
    }

    if (stretch_ends) {
      if constexpr (S::kGroups > 1) {
#pragma unroll
        for (int k = 0; k < MicroK; ++k) {
#pragma unroll
          for (int j = 0; j < MicroJ; ++j) group_sums[group][(k_own + k) * Tile + j_own + j] = product[k][j];
        }
        __syncthreads();
      }
      const std::int64_t label = p.labels[sample];
      const bool class_ends = next_sample >= last || p.labels[next_sample] != label;
      T* out = nullptr;
      if (p.splits > 1) {
        out = static_cast<T*>(p.pieces) + (sample * p.splits + static_cast<std::int64_t>(blockIdx.y)) * p.rows * p.columns;
      } else if (class_ends) {
        out = destination<T>(p, label, first_of_chunk);
      }
      T square = 0;
#pragma unroll
      for (int e = 0; e < S::kOwned; ++e) {
        T value;
        int k, j;
        if constexpr (S::kGroups > 1) {
          const int element = thread + e * kThreads;
          k = element / Tile;
          j = element % Tile;
          value = 0;
#pragma unroll
          for (int g = 0; g < S::kGroups; ++g) value += group_sums[g][element];
        } else {
          k = k_own + e / MicroJ;
          j = j_own + e % MicroJ;
          value = product[e / MicroJ][e % MicroJ];
        }
        owned[e] += value;
        if (k_first + k < p.rows && j_first + j < p.columns) {
          square += value * value;
          if (out != nullptr) out[(k_first + k) * p.columns + j_first + j] = owned[e];
        }
        if (out != nullptr) owned[e] = 0;
      }
#pragma unroll
      for (int k = 0; k < MicroK; ++k) {
#pragma unroll
        for (int j = 0; j < MicroJ; ++j) product[k][j] = 0;
      }
      if (!single && p.splits == 1) {
        square = block_sum<kThreads>(square, warp_sums);
        if (thread == 0) {
          static_cast<T*>(p.weights)[tile * p.samples + sample] = square;
        }
      }
    }
    if (next_sample >= last) return;
    sample = next_sample;
    offset = next_offset;
    size = next_size;
    __syncthreads();  // everybody has read the tiles and the sums
  }
}

// The squared norm of a sample of one position: |d|^2 |a|^2. One warp a sample.
template <typename In, typename T>
__global__ __launch_bounds__(kThreads) void row_weights_kernel(Products p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * (kThreads / 32) + static_cast<int>(threadIdx.x) / 32;
  if (at >= p.samples) return;  // the whole warp
  const std::int64_t row = p.order[at];
  T norms[2] = {0, 0};
  for (std::int64_t k = lane; k < p.rows; k += 32) {
    const T value = widen<T>(static_cast<const In*>(p.deltas)[row * p.rows + k], p.bfloat);
    norms[0] += value * value;
  }
  for (std::int64_t j = lane; j < p.columns; j += 32) {
    const T value = widen<T>(static_cast<const In*>(p.activations)[row * p.columns + j], p.bfloat);
    norms[1] += value * value;
  }
#pragma unroll
  for (int side = 0; side < 2; ++side) {
#pragma unroll
    for (int away = 16; away > 0; away /= 2) norms[side] += __shfl_down_sync(0xffffffffu, norms[side], away);
  }
  if (lane == 0) static_cast<T*>(p.weights)[at] = norms[0] * norms[1];
}

// Where the positions of a sample were cut: its product from the pieces, and that product's squared norm.
template <typename T>
__global__ __launch_bounds__(kThreads) void merge_kernel(Products p) {
  __shared__ T warp_sums[kThreads / 32];
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) / p.merged;
  const std::int64_t part = static_cast<std::int64_t>(blockIdx.x) % p.merged;
  if (at < p.starts[0] || at >= p.starts[p.classes]) return;
  const std::int64_t area = p.rows * p.columns;
  const T* const pieces = static_cast<const T*>(p.pieces) + at * p.splits * area;
  T* const out = destination<T>(p, p.labels[at], at);
  const std::int64_t first = part * kMergedElements;
  const std::int64_t last = first + kMergedElements < area ? first + kMergedElements : area;
  T square = 0;
  for (std::int64_t e = first + static_cast<int>(threadIdx.x); e < last; e += kThreads) {
    T value = 0;
    for (std::int64_t s = 0; s < p.splits; ++s) value += pieces[s * area + e];
    out[e] = value;
    square += value * value;
  }
  square = block_sum<kThreads>(square, warp_sums);
  if (threadIdx.x == 0) static_cast<T*>(p.weights)[part * p.samples + at] = square;
}

// The classes that several chunks share or no sample has, and the squares of all.
template <typename T>
__global__ __launch_bounds__(kThreads) void finish_kernel(Products p) {
  __shared__ T warp_sums[kThreads / 32];
  const std::int64_t label = static_cast<std::int64_t>(blockIdx.x) / p.merged;
  const std::int64_t part = static_cast<std::int64_t>(blockIdx.x) % p.merged;
  const std::int64_t begin = p.starts[label], end = p.starts[label + 1];
  const std::int64_t area = p.rows * p.columns;
  if (part == 0) {
    T square = 0;
    for (std::int64_t i = begin + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
      for (std::int64_t set = 0; set < p.weight_sets; ++set) {
        square += static_cast<const T*>(p.weights)[set * p.samples + i];
      }
    }
    square = block_sum<kThreads>(square, warp_sums);
    if (threadIdx.x == 0) static_cast<T*>(p.squares)[label] = square;
  }
  const std::int64_t first_chunk = begin / p.chunk;
  const std::int64_t last_chunk = end > begin ? (end - 1) / p.chunk : first_chunk;
  if (end > begin && first_chunk == last_chunk) return;  // written already
  const T* const partial = static_cast<const T*>(p.partial);
  const std::int64_t first = part * kMergedElements;
  const std::int64_t last = first + kMergedElements < area ? first + kMergedElements : area;
  for (std::int64_t e = first + static_cast<int>(threadIdx.x); e < last; e += kThreads) {
    T sum = 0;
    if (end > begin) {
      sum = partial[(2 * first_chunk + 1) * area + e];
#pragma unroll 4
      for (std::int64_t chunk = first_chunk + 1; chunk <= last_chunk; ++chunk) sum += partial[2 * chunk * area + e];
    }
    static_cast<T*>(p.sums)[label * area + e] = sum;
  }
}

// How the work is cut: by the sizes alone, so that the order of additions is the same on every device.
struct Plan {
  int tile;
  std::int64_t row_tiles, column_tiles;
  std::int64_t chunk, chunks;
  std::int64_t splits;
  std::int64_t merged;  // blocks of kMergedElements in the output
  std::int64_t weight_sets;
  std::int64_t partial_elements, weight_elements, piece_elements;
};

constexpr std::int64_t kEnoughBlocks = 1024;
constexpr std::int64_t kFewBlocks = 128;        // so few that the positions are cut as well
constexpr std::int64_t kLeastSingles = 16;      // samples of a block, if they have one position
constexpr std::int64_t kLeastOfSplit = 256;     // positions of a piece

std::int64_t up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

Plan plan(Dtype dtype, std::int64_t samples, std::int64_t positions, std::int64_t rows, std::int64_t columns) {
  Plan p = {};
  const std::int64_t widest = std::max(rows, columns);
  p.tile = dtype == Dtype::kFloat64 || widest <= 16 ? 16 : widest <= 32 ? 32 : 64;
  p.row_tiles = up(rows, p.tile);
  p.column_tiles = up(columns, p.tile);
  const std::int64_t tiles = p.row_tiles * p.column_tiles;
  p.chunk = std::max<std::int64_t>(up(samples * tiles, kEnoughBlocks), positions == 1 ? kLeastSingles : 1);
  p.splits = 1;
  if (samples * tiles < kFewBlocks && positions >= 2 * kLeastOfSplit) {
    const std::int64_t wanted = std::min(up(2 * kFewBlocks, samples * tiles), positions / kLeastOfSplit);
    const std::int64_t length = up(positions, wanted);
    p.splits = up(positions, length);  // none of them empty
  }
  p.chunks = up(samples, p.chunk);
  p.merged = up(rows * columns, kMergedElements);
  p.weight_sets = positions == 1 ? 1 : p.splits > 1 ? p.merged : tiles;
  p.partial_elements = 2 * p.chunks * rows * columns;
  p.weight_elements = p.weight_sets * samples;
  p.piece_elements = p.splits > 1 ? samples * p.splits * rows * columns : 0;
  return p;
}

bool nothing_to_add(std::int64_t samples, std::int64_t positions, std::int64_t rows, std::int64_t columns) {
  return samples == 0 || positions == 0 || rows == 0 || columns == 0;
}

template <typename In, typename T>
void run(const ClassSketchCuda& problem, cudaStream_t stream) {
  const std::int64_t area = problem.rows * problem.columns;
  if (nothing_to_add(problem.samples, problem.positions, problem.rows, problem.columns)) {
    const auto clear = [&](void* memory, std::int64_t count) {
      if (count == 0) return;
      cuda_check(cudaMemsetAsync(memory, 0, static_cast<std::size_t>(count) * sizeof(T), stream), "class_sketch: clearing");
    };
    clear(problem.sums, problem.classes * area);
    clear(problem.squares, problem.classes);
    return;
  }
  if (problem.classes == 0) return;

  const Plan cut = plan(problem.dtype, problem.samples, problem.positions, problem.rows, problem.columns);
  T* const workspace = static_cast<T*>(problem.workspace);
  Products p = {};
  p.deltas = problem.deltas;
  p.activations = problem.activations;
  p.order = problem.order;
  p.labels = problem.labels;
  p.starts = problem.starts;
  p.sums = problem.sums;
  p.squares = problem.squares;
  p.partial = workspace;
  p.weights = workspace + cut.partial_elements;
  p.pieces = workspace + cut.partial_elements + cut.weight_elements;
  p.samples = problem.samples;
  p.positions = problem.positions;
  p.rows = problem.rows;
  p.columns = problem.columns;
  p.classes = problem.classes;
  p.chunk = cut.chunk;
  p.tiles = cut.row_tiles * cut.column_tiles;
  p.column_tiles = cut.column_tiles;
  p.merged = cut.merged;
  p.weight_sets = cut.weight_sets;
  p.splits = cut.splits;
  constexpr std::int64_t bytes = std::min<std::int64_t>(16, 4 * sizeof(In));
  p.packed_deltas = p.rows % 4 == 0 && aligned_to(p.deltas, bytes);
  p.bfloat = problem.dtype == Dtype::kBfloat16;
  p.packed_activations = p.columns % 4 == 0 && aligned_to(p.activations, bytes);

  const Grid grid = {cut.chunks * p.tiles, cut.splits};
  if constexpr (std::is_same_v<T, double>) {
    launch("class_sketch products", products_kernel<In, T, 16, 4, 4, 32>, grid, kThreads, stream, p);
  } else if (cut.tile == 16) {
    launch("class_sketch products", products_kernel<In, T, 16, 4, 4, 64>, grid, kThreads, stream, p);
  } else if (cut.tile == 32) {
    launch("class_sketch products", products_kernel<In, T, 32, 4, 8, 32>, grid, kThreads, stream, p);
  } else {
    launch("class_sketch products", products_kernel<In, T, 64, 8, 4, 16>, grid, kThreads, stream, p);
  }
  if (p.positions == 1) {
    launch("class_sketch weights", row_weights_kernel<In, T>, {up(p.samples, kThreads / 32), 1}, kThreads, stream, p);
  }
  if (p.splits > 1) launch("class_sketch merge", merge_kernel<T>, {p.samples * p.merged, 1}, kThreads, stream, p);
  launch("class_sketch finish", finish_kernel<T>, {p.classes * p.merged, 1}, kThreads, stream, p);
}

}  // namespace

std::int64_t class_sketch_cuda_workspace(Dtype dtype, std::int64_t samples, std::int64_t positions, std::int64_t rows,
                                         std::int64_t columns) {
  if (nothing_to_add(samples, positions, rows, columns)) return 0;
  const Plan cut = plan(dtype, samples, positions, rows, columns);
  return cut.partial_elements + cut.weight_elements + cut.piece_elements;
}

void class_sketch_cuda(const ClassSketchCuda& problem, int device, std::uintptr_t stream) {
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
