#include "class_sketch.hpp"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "class_sketch_kernel.hpp"
#include "cpu_level.hpp"
#include "parallel.hpp"

namespace gradmix {
namespace {

namespace kernels = class_sketch_kernel;

// One piece of work: some samples of one class against some rows of its output. No two pieces write the same memory, and
// which pieces there are depends on the shapes and labels alone.
template <typename T>
struct Piece {
  std::int64_t begin;  // in the list of samples by class
  std::int64_t end;
  std::int64_t k;
  std::int64_t k_count;
  T* out;  // its row k
};

constexpr std::int64_t kRowsOfOutput = 64;      // of one piece
constexpr std::int64_t kLeastPositions = 512;   // of one piece, if its class has them
constexpr std::int64_t kMostParts = 64;         // partial sums over all classes
constexpr std::int64_t kPartsBytes = 8 << 20;   // memory for them
constexpr std::int64_t kBlockBytes = 32 << 10;  // inputs that one block reads, to stay in the first cache
constexpr std::int64_t kProductBytes = 32 << 10;  // of one sample's product at a time, to stay there as well
constexpr std::int64_t kSmallWork = 1 << 16;    // multiply-adds that are not worth waking threads for
constexpr std::int64_t kSamplesOfNorms = 256;   // of one piece where norms are all there is to do

// In is the element type as it lies in memory (uint16_t for the half types), T the one that is computed with.
template <typename In, typename T>
struct Kernels {
  void (*block)(const kernels::Block<T>&);
  double (*take)(const T*, std::int64_t, std::int64_t, std::int64_t, T*, std::int64_t);
  void (*convert)(const std::uint16_t*, float*, std::int64_t);  // null where In is T
};

template <typename In, typename T>
class Run {
 public:
  Run(const ClassSketch& problem, int threads, const Kernels<In, T>& kernel)
      : p_(problem),
        kernel_(kernel),
        K_(problem.rows),
        J_(problem.columns),
        T_(problem.positions),
        deltas_(static_cast<const In*>(problem.deltas)),
        activations_(static_cast<const In*>(problem.activations)),
        threads_(threads) {}

  void operator()() {
    sort_by_class();
    cut();
    const std::int64_t work = p_.samples * T_ * area() + p_.classes * area() / 8;
    if (work < kSmallWork) threads_ = 1;
    threads_ = static_cast<int>(std::min<std::int64_t>(threads_, static_cast<std::int64_t>(pieces_.size())));

    const std::int64_t strip = std::min(K_, kRowsOfOutput);
    const std::int64_t width = strip + J_;
    block_ = std::clamp<std::int64_t>(kBlockBytes / (width * size()) / 8 * 8, 32, 256);
    columns_ = std::clamp<std::int64_t>(kProductBytes / (strip * size()) / 32 * 32, 32, J_ + 32);
    const std::int64_t scratch = block_ * (kernels::kMaxLanes + (converts ? width : 0)) + strip * columns_;
    scratch_.resize(static_cast<std::size_t>(threads_ * scratch));
    row_lists_.resize(static_cast<std::size_t>(threads_ * block_));
    parallel_for(static_cast<std::int64_t>(pieces_.size()), threads_, [&](std::int64_t index, int thread) {
      const Piece<T>& piece = pieces_[index];
      T* const own = scratch_.data() + thread * scratch;
      std::int64_t* const rows = row_lists_.data() + thread * block_;
      if (piece.begin == piece.end || T_ == 0) {
        std::memset(piece.out, 0, static_cast<std::size_t>(piece.k_count * J_) * sizeof(T));
      } else if (T_ == 1) {
        together(piece, own, rows);
      } else {
        squares_[index] = one_by_one(piece, own, rows);
      }
    });
    parallel_for(static_cast<std::int64_t>(sums_.size()), threads_, [&](std::int64_t index, int) {
      const Sum& sum = sums_[index];
      T* const to = out() + sum.cls * area();
      for (std::int64_t i = 0; i < sum.count; ++i) {
        const T* const from = parts_.data() + (sum.first_part + i) * area();
        for (std::int64_t e = 0; e < area(); ++e) to[e] += from[e];
      }
    });
    write_squares();
  }

 private:
  static constexpr bool converts = !std::is_same_v<In, T>;
  static constexpr std::int64_t size() { return static_cast<std::int64_t>(sizeof(T)); }
  std::int64_t area() const { return K_ * J_; }
  T* out() const { return static_cast<T*>(p_.sums); }

  // A class of more than one piece sums its first into the output and each other one into a part of its own.
  struct Sum {
    std::int64_t cls, first_part, count;
  };

  // The samples of each class, in their order.
  void sort_by_class() {
    starts_.assign(static_cast<std::size_t>(p_.classes) + 1, 0);
    for (std::int64_t n = 0; n < p_.samples; ++n) ++starts_[p_.labels[n] + 1];
    for (std::int64_t c = 0; c < p_.classes; ++c) starts_[c + 1] += starts_[c];
    samples_.resize(static_cast<std::size_t>(p_.samples));
    std::vector<std::int64_t> next(starts_.begin(), starts_.end() - 1);
    for (std::int64_t n = 0; n < p_.samples; ++n) samples_[next[p_.labels[n]]++] = n;
  }

  void cut() {
    const std::int64_t most_parts = std::clamp<std::int64_t>(kPartsBytes / (area() * size()), 1, kMostParts);
    const std::int64_t positions = std::max<std::int64_t>(T_, 1);
    const std::int64_t chunk = std::max((kLeastPositions + positions - 1) / positions,
                                        (p_.samples + most_parts - 1) / most_parts);
    std::int64_t parts = 0;
    for (std::int64_t c = 0; c < p_.classes; ++c) {
      const std::int64_t chunks = (starts_[c + 1] - starts_[c] + chunk - 1) / chunk;
      if (chunks > 1) {
        sums_.push_back({c, parts, chunks - 1});
        parts += chunks - 1;
      }
    }
    parts_.resize(static_cast<std::size_t>(parts * area()));
    first_piece_.reserve(static_cast<std::size_t>(p_.classes) + 1);
    pieces_.reserve(static_cast<std::size_t>((p_.classes + parts) * ((K_ + kRowsOfOutput - 1) / kRowsOfOutput)));
    std::int64_t part = 0;
    for (std::int64_t c = 0; c < p_.classes; ++c) {
      first_piece_.push_back(static_cast<std::int64_t>(pieces_.size()));
      std::int64_t begin = starts_[c];
      do {
        T* const to = begin == starts_[c] ? out() + c * area() : parts_.data() + area() * part++;
        const std::int64_t end = std::min(begin + chunk, starts_[c + 1]);
        for (std::int64_t k = 0; k < K_; k += kRowsOfOutput) {
          pieces_.push_back({begin, end, k, std::min(kRowsOfOutput, K_ - k), to + k * J_});
        }
        begin = end;
      } while (begin < starts_[c + 1]);
    }
    first_piece_.push_back(static_cast<std::int64_t>(pieces_.size()));
    squares_.assign(pieces_.size(), 0.0);
  }

  // Points a block at `count` rows of the inputs, named by rows[]: their entries [k, k + b.k) and [j, j + b.j).
  void aim(kernels::Block<T>& b, std::int64_t* rows, std::int64_t count, std::int64_t k, std::int64_t j, T* scratch) const {
    b.rows = rows;
    b.count = count;
    b.scratch = scratch;
    if constexpr (converts) {
      T* const d = scratch + block_ * kernels::kMaxLanes;
      T* const a = d + block_ * b.k;
      for (std::int64_t r = 0; r < count; ++r) {
        kernel_.convert(deltas_ + rows[r] * K_ + k, d + r * b.k, b.k);
        kernel_.convert(activations_ + rows[r] * J_ + j, a + r * b.j, b.j);
        rows[r] = r;
      }
      b.deltas = d;
      b.delta_stride = b.k;
      b.activations = a;
      b.activation_stride = b.j;
    } else {
      b.deltas = deltas_ + k;
      b.delta_stride = K_;
      b.activations = activations_ + j;
      b.activation_stride = J_;
    }
  }

  // One position a sample: all samples of the piece in one product, which is the sum wanted.
  void together(const Piece<T>& piece, T* scratch, std::int64_t* rows) const {
    kernels::Block<T> b{};
    b.k = piece.k_count;
    b.j = J_;
    b.out = piece.out;
    b.out_stride = J_;
    for (std::int64_t begin = piece.begin; begin < piece.end; begin += block_) {
      const std::int64_t count = std::min(block_, piece.end - begin);
      std::copy_n(samples_.data() + begin, count, rows);
      aim(b, rows, count, piece.k, 0, scratch);
      b.accumulate = begin != piece.begin;
      kernel_.block(b);
    }
  }

  // Several positions a sample: the product of each sample, as much of it at a time as stays in the cache, is squared
  // before it is added. The piece's first needs no adding.
  double one_by_one(const Piece<T>& piece, T* scratch, std::int64_t* rows) const {
    T* const product = scratch + block_ * (kernels::kMaxLanes + (converts ? std::min(K_, kRowsOfOutput) + J_ : 0));
    double squares = 0;
    for (std::int64_t index = piece.begin; index < piece.end; ++index) {
      const std::int64_t first = samples_[index] * T_;
      const bool direct = index == piece.begin;
      for (std::int64_t j = 0; j < J_; j += columns_) {
        kernels::Block<T> b{};
        b.k = piece.k_count;
        b.j = std::min(columns_, J_ - j);
        b.out = direct ? piece.out + j : product;
        b.out_stride = direct ? J_ : columns_;
        for (std::int64_t begin = 0; begin < T_; begin += block_) {
          const std::int64_t count = std::min(block_, T_ - begin);
          for (std::int64_t r = 0; r < count; ++r) rows[r] = first + begin + r;
          aim(b, rows, count, piece.k, j, scratch);
          b.accumulate = begin != 0;
          kernel_.block(b);
        }
        squares += kernel_.take(b.out, b.out_stride, b.k, b.j, direct ? nullptr : piece.out + j, J_);
      }
    }
    return squares;
  }

  void write_squares() {
    auto* const to = static_cast<T*>(p_.squares);
    if (T_ == 1) {
      // ||d a^T||^2 = ||d||^2 ||a||^2.
      std::vector<double> norms(static_cast<std::size_t>(p_.samples));
      const std::int64_t longest = std::max(K_, J_);
      std::vector<T> scratch(converts ? static_cast<std::size_t>(threads_ * longest) : 0);
      const std::int64_t pieces = (p_.samples + kSamplesOfNorms - 1) / kSamplesOfNorms;
      parallel_for(pieces, threads_, [&](std::int64_t piece, int thread) {
        const auto square = [&](const In* row, std::int64_t count) {
          if constexpr (converts) {
            T* const own = scratch.data() + thread * longest;
            kernel_.convert(row, own, count);
            return kernel_.take(own, 0, 1, count, nullptr, 0);
          } else {
            return kernel_.take(row, 0, 1, count, nullptr, 0);
          }
        };
        const std::int64_t end = std::min(p_.samples, (piece + 1) * kSamplesOfNorms);
        for (std::int64_t n = piece * kSamplesOfNorms; n < end; ++n) {
          norms[n] = square(deltas_ + n * K_, K_) * square(activations_ + n * J_, J_);
        }
      });
      for (std::int64_t c = 0; c < p_.classes; ++c) {
        double sum = 0;
        for (std::int64_t i = starts_[c]; i < starts_[c + 1]; ++i) sum += norms[samples_[i]];
        to[c] = static_cast<T>(sum);
      }
      return;
    }
    for (std::int64_t c = 0; c < p_.classes; ++c) {
      double sum = 0;
      for (std::int64_t i = first_piece_[c]; i < first_piece_[c + 1]; ++i) sum += squares_[i];
      to[c] = static_cast<T>(sum);
    }
  }

  const ClassSketch& p_;
  const Kernels<In, T> kernel_;
  const std::int64_t K_, J_, T_;
  const In* const deltas_;
  const In* const activations_;
  int threads_;
  std::int64_t block_ = 0;    // positions at a time
  std::int64_t columns_ = 0;  // of a sample's product at a time
  std::vector<std::int64_t> starts_, samples_, first_piece_;
  std::vector<Sum> sums_;
  std::vector<Piece<T>> pieces_;
  std::vector<double> squares_;  // of each piece
  std::vector<T> parts_, scratch_;
  std::vector<std::int64_t> row_lists_;
};

}  // namespace

std::int64_t first_bad_label(const std::int64_t* labels, std::int64_t samples, std::int64_t classes) {
  for (std::int64_t n = 0; n < samples; ++n) {
    if (labels[n] < 0 || labels[n] >= classes) return n;
  }
  return -1;
}

void class_sketch(const ClassSketch& problem, int threads) {
  if (problem.classes == 0) return;
  if (problem.rows == 0 || problem.columns == 0) {
    const std::int64_t item = problem.dtype == Dtype::kFloat64 ? 8 : 4;
    std::memset(problem.squares, 0, static_cast<std::size_t>(problem.classes * item));
    return;
  }
  const kernels::Table& table = GRADMIX_KERNELS(kernels);
  switch (problem.dtype) {
    case Dtype::kFloat32:
      return Run<float, float>(problem, threads, {table.block_float32, table.take_float32, nullptr})();
    case Dtype::kFloat64:
      return Run<double, double>(problem, threads, {table.block_float64, table.take_float64, nullptr})();
    case Dtype::kBfloat16:
      return Run<std::uint16_t, float>(problem, threads,
                                       {table.block_float32, table.take_float32, table.from_bfloat16})();
    case Dtype::kFloat16:
      return Run<std::uint16_t, float>(problem, threads,
                                       {table.block_float32, table.take_float32, table.from_float16})();
    case Dtype::kUint8:
    case Dtype::kInt64: return;  // refused where the arguments are read
  }
}

}  // namespace gradmix
