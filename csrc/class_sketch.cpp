#include "class_sketch.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "class_sketch_kernel.hpp"
#include "parallel.hpp"

namespace gradmix {
namespace {

// The newest instruction set of this machine, or an older one that GRADMIX_CPU_LEVEL names (to test and to compare).
const kernel::Table& table() {
#if defined(GRADMIX_X86_LEVELS)
  static const kernel::Table& chosen = []() -> const kernel::Table& {
    __builtin_cpu_init();
    const char* const named = std::getenv("GRADMIX_CPU_LEVEL");
    const std::string most = named == nullptr ? "avx512" : named;
    if (most == "base") return kernel::base();
    if (most != "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")) {
      return kernel::avx512();
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kernel::avx2();
    return kernel::base();
  }();
  return chosen;
#else
  return kernel::base();
#endif
}

// One piece of work: some samples' positions of one class against some rows of its output. No two pieces write the same
// memory, and which pieces there are depends on the shapes and labels alone.
template <typename T>
struct Piece {
  std::int64_t first;  // of the class's sample list
  std::int64_t begin;  // position counted over the class's samples
  std::int64_t end;
  std::int64_t k;
  std::int64_t k_count;
  T* out;  // its row k
};

constexpr std::int64_t kRowsOfOutput = 64;            // of one piece
constexpr std::int64_t kLeastPositions = 512;         // of one piece, if its class has them
constexpr std::int64_t kMostParts = 64;               // partial sums over all classes
constexpr std::int64_t kPartsBytes = 8 << 20;         // memory for them
constexpr std::int64_t kBlockBytes = 32 << 10;        // inputs that one block reads, to stay in the first cache
constexpr std::int64_t kSmallWork = 1 << 16;          // multiply-adds that are not worth waking threads for

// In is the element type as it lies in memory (uint16_t for the half types), T the one that is computed with.
template <typename In, typename T>
void run(const ClassSketch& p, int threads, void (*body)(const kernel::Block<T>&),
         void (*convert)(const std::uint16_t*, float*, std::int64_t)) {
  constexpr bool converts = !std::is_same_v<In, T>;
  const std::int64_t K = p.rows, J = p.columns, area = K * J;
  const auto* const deltas = static_cast<const In*>(p.deltas);
  const auto* const activations = static_cast<const In*>(p.activations);
  auto* const out = static_cast<T*>(p.out);

  // The samples of each class, in their order.
  std::vector<std::int64_t> starts(static_cast<std::size_t>(p.classes) + 1, 0);
  for (std::int64_t n = 0; n < p.samples; ++n) ++starts[p.labels[n] + 1];
  for (std::int64_t c = 0; c < p.classes; ++c) starts[c + 1] += starts[c];
  std::vector<std::int64_t> samples(static_cast<std::size_t>(p.samples));
  {
    std::vector<std::int64_t> next(starts.begin(), starts.end() - 1);
    for (std::int64_t n = 0; n < p.samples; ++n) samples[next[p.labels[n]]++] = n;
  }

  const std::int64_t total = p.samples * p.positions;
  const std::int64_t most_parts =
      std::clamp<std::int64_t>(kPartsBytes / (area * static_cast<std::int64_t>(sizeof(T))), 1, kMostParts);
  const std::int64_t chunk = std::max(kLeastPositions, (total + most_parts - 1) / most_parts);

  // A class of more than one chunk sums its first into the output and each other one into a part of its own.
  struct Sum {
    std::int64_t cls, first_part, count;
  };
  std::vector<Sum> sums;
  std::int64_t parts_count = 0;
  for (std::int64_t c = 0; c < p.classes; ++c) {
    const std::int64_t chunks = ((starts[c + 1] - starts[c]) * p.positions + chunk - 1) / chunk;
    if (chunks > 1) {
      sums.push_back({c, parts_count, chunks - 1});
      parts_count += chunks - 1;
    }
  }
  std::vector<T> parts(static_cast<std::size_t>(parts_count * area));

  std::vector<Piece<T>> pieces;
  pieces.reserve(static_cast<std::size_t>((p.classes + parts_count) * ((K + kRowsOfOutput - 1) / kRowsOfOutput)));
  std::int64_t part = 0;
  for (std::int64_t c = 0; c < p.classes; ++c) {
    const std::int64_t positions = (starts[c + 1] - starts[c]) * p.positions;
    std::int64_t begin = 0;
    do {
      T* const to = begin == 0 ? out + c * area : parts.data() + area * part++;
      const std::int64_t end = std::min(begin + chunk, positions);
      for (std::int64_t k = 0; k < K; k += kRowsOfOutput) {
        pieces.push_back({starts[c], begin, end, k, std::min(kRowsOfOutput, K - k), to + k * J});
      }
      begin = end;
    } while (begin < positions);
  }

  const std::int64_t width = std::min(K, kRowsOfOutput) + J;
  const std::int64_t block = std::clamp<std::int64_t>(
      kBlockBytes / (width * static_cast<std::int64_t>(sizeof(T))) / 8 * 8, 32, 256);
  const std::int64_t scratch_size = block * (kernel::kMaxLanes + (converts ? width : 0));
  if (total * area + p.classes * area / 8 < kSmallWork) threads = 1;
  threads = static_cast<int>(std::min<std::int64_t>(threads, static_cast<std::int64_t>(pieces.size())));
  std::vector<T> scratch(static_cast<std::size_t>(threads * scratch_size));
  std::vector<std::int64_t> row_lists(static_cast<std::size_t>(threads * block));

  parallel_for(static_cast<std::int64_t>(pieces.size()), threads, [&](std::int64_t index, int thread) {
    const Piece<T>& piece = pieces[index];
    if (piece.begin == piece.end) {
      std::memset(piece.out, 0, static_cast<std::size_t>(piece.k_count * J) * sizeof(T));
      return;
    }
    std::int64_t* const rows = row_lists.data() + thread * block;
    T* const own = scratch.data() + thread * scratch_size;
    kernel::Block<T> b{};
    b.rows = rows;
    b.k = piece.k_count;
    b.j = J;
    b.out = piece.out;
    b.out_stride = J;
    b.scratch = own;
    std::int64_t sample = piece.begin / p.positions;
    std::int64_t position = piece.begin % p.positions;
    for (std::int64_t begin = piece.begin; begin < piece.end; begin += block) {
      b.count = std::min(block, piece.end - begin);
      for (std::int64_t r = 0; r < b.count; ++r) {
        rows[r] = samples[piece.first + sample] * p.positions + position;
        if (++position == p.positions) {
          position = 0;
          ++sample;
        }
      }
      if constexpr (converts) {
        T* const d = own + block * kernel::kMaxLanes;
        T* const a = d + block * b.k;
        for (std::int64_t r = 0; r < b.count; ++r) {
          convert(deltas + rows[r] * K + piece.k, d + r * b.k, b.k);
          convert(activations + rows[r] * J, a + r * J, J);
          rows[r] = r;
        }
        b.deltas = d;
        b.delta_stride = b.k;
        b.activations = a;
      } else {
        b.deltas = deltas + piece.k;
        b.delta_stride = K;
        b.activations = activations;
      }
      b.activation_stride = J;
      b.accumulate = begin != piece.begin;
      body(b);
    }
  });

  parallel_for(static_cast<std::int64_t>(sums.size()), threads, [&](std::int64_t index, int) {
    const Sum& sum = sums[index];
    T* const to = out + sum.cls * area;
    for (std::int64_t i = 0; i < sum.count; ++i) {
      const T* const from = parts.data() + (sum.first_part + i) * area;
      for (std::int64_t e = 0; e < area; ++e) to[e] += from[e];
    }
  });
}

}  // namespace

std::int64_t first_bad_label(const std::int64_t* labels, std::int64_t samples, std::int64_t classes) {
  for (std::int64_t n = 0; n < samples; ++n) {
    if (labels[n] < 0 || labels[n] >= classes) return n;
  }
  return -1;
}

void class_sketch(const ClassSketch& problem, int threads) {
  if (problem.classes == 0 || problem.rows == 0 || problem.columns == 0) return;
  const kernel::Table& kernels = table();
  switch (problem.dtype) {
    case Dtype::kFloat32: return run<float, float>(problem, threads, kernels.float32, nullptr);
    case Dtype::kFloat64: return run<double, double>(problem, threads, kernels.float64, nullptr);
    case Dtype::kBfloat16:
      return run<std::uint16_t, float>(problem, threads, kernels.float32, kernels.from_bfloat16);
    case Dtype::kFloat16: return run<std::uint16_t, float>(problem, threads, kernels.float32, kernels.from_float16);
    case Dtype::kInt64: return;  // refused where the arguments are read
  }
}

const char* class_sketch_instruction_set() { return table().name; }

}  // namespace gradmix
