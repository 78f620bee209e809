#include "mixed_alignment.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "cpu_level.hpp"
#include "mixed_alignment_kernel.hpp"
#include "parallel.hpp"

namespace gradmix {
namespace {

namespace kernels = mixed_alignment_kernel;

// Of A and of B. Sums of scaled squares, up to 2^108 a class, stay finite in float up to 2^19 classes.
constexpr double kScale = 0x1p27;
// R below this, relative to its own largest possible term, is computed again: the squares of float lose their digits first.
constexpr double kUnderflow = 1e-20;
// R does not matter below exp(-kNegligible) of the labels' own terms.
constexpr double kNegligible = 20.0;
// D of different labels below this share of the whole is computed again: exponentials leave it an error of up to 1e-13 of that.
template <typename T>
constexpr double kClose = sizeof(T) == sizeof(double) ? 1e-2 : 1e-6;
// A residual below this has no square.
constexpr double kSmallest = 1e-140;
// Pairs whose ||r||^2 is below this share of its parts' are computed again: label vectors that the samples fit well.
constexpr double kCancelled = 1.0 / 16;
// Features and references of entries up to this, or down to its inverse, are left in their units.
constexpr double kModerate = 1e6;
// Residuals are held at this size, divided by the largest possible entry of U.
template <typename T>
constexpr double kLeast = sizeof(T) == sizeof(double) ? 1e-150 : 1e-32;

constexpr std::int64_t kClassesAtATime = 128;  // of the packed samples, to stay in the first cache
constexpr std::int64_t kTilesOfPiece = 8;      // of the first side's
constexpr std::int64_t kRowsAtATime = 16;      // of what is only read through
constexpr std::int64_t kSmallWork = 1 << 20;   // multiply-adds that are not worth waking threads for

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Extent {
  double square = 0;
  double largest = 0;
  bool finite() const { return square < kInfinity; }
  bool moderate() const { return !finite() || largest == 0 || (largest >= 1 / kModerate && largest <= kModerate); }
};

// The classes that a side's labels name, and the place of each sample's class among them.
struct Labels {
  std::vector<std::int64_t> classes;
  std::vector<std::int32_t> slots;

  Labels(const MixedSide& side, std::int64_t count) : slots(static_cast<std::size_t>(side.count)) {
    std::vector<std::int32_t> place(static_cast<std::size_t>(count), -1);
    for (std::int64_t i = 0; i < side.count; ++i) {
      std::int32_t& slot = place[side.labels[i]];
      if (slot < 0) {
        slot = static_cast<std::int32_t>(classes.size());
        classes.push_back(side.labels[i]);
      }
      slots[i] = slot;
    }
  }
};

// Memory that is written before it is read.
template <typename T>
class Unset {
 public:
  void resize(std::size_t count) { memory_.reset(new T[count]); }
  T* data() const { return memory_.get(); }
  T& operator[](std::int64_t index) const { return memory_[index]; }

 private:
  std::unique_ptr<T[]> memory_;
};

// One side's arrays in their type.
template <typename T>
struct Side {
  const T* features;
  const T* logits;
  const std::int64_t* labels;
  const T* projected;
  const T* beside;
  std::int64_t count;

  explicit Side(const MixedSide& side)
      : features(static_cast<const T*>(side.features)),
        logits(static_cast<const T*>(side.logits)),
        labels(side.labels),
        projected(static_cast<const T*>(side.projected)),
        beside(static_cast<const T*>(side.beside)),
        count(side.count) {}
};

template <typename T>
class Run {
 public:
  Run(const MixedAlignment& problem, const kernels::Functions<T>& kernel, int threads)
      : p_(problem),
        a_(problem.a),
        b_(problem.b),
        kernel_(kernel),
        threads_(threads),
        rows_((a_.count + kernel_.rows - 1) / kernel_.rows * kernel_.rows),
        columns_((b_.count + kernel_.columns - 1) / kernel_.columns * kernel_.columns),
        vectors_(a_.beside != nullptr),
        same_(a_.features == b_.features && a_.logits == b_.logits && a_.labels == b_.labels && a_.count == b_.count) {}

  bool operator()() {
    const double work = static_cast<double>(a_.count) * static_cast<double>(b_.count) *
                        static_cast<double>(p_.classes + 16) * static_cast<double>(p_.mixtures);
    if (work < kSmallWork) threads_ = 1;
    if (!measure()) return false;
    const Labels labels_a(p_.a, p_.classes);
    std::optional<Labels> labels_b;
    if (!same_) labels_b.emplace(p_.b, p_.classes);
    slots_a_ = &labels_a;
    slots_b_ = same_ ? &labels_a : &*labels_b;
    reserve();
    describe();
    for (std::int64_t mixture = 0; mixture < p_.mixtures; ++mixture) {
      weigh(p_.lams[mixture]);
      pack();
      inner_ = static_cast<T*>(p_.inner) + mixture * a_.count * b_.count;
      norm_ = p_.norm == nullptr ? nullptr : static_cast<T*>(p_.norm) + mixture * a_.count * b_.count;
      const std::int64_t panels = columns_ / kernel_.columns, pieces = (rows_ + rows_of_piece() - 1) / rows_of_piece();
      parallel_for(panels * pieces, threads_, [&](std::int64_t index, int thread) {
        piece(index / pieces, index % pieces * rows_of_piece(), sums_.data() + thread * sums_of_thread());
      });
    }
    return true;
  }

 private:
  using Row = kernels::Row<T>;
  using Beside = kernels::Beside<T>;

  std::int64_t rows_of_piece() const { return kTilesOfPiece * kernel_.rows; }
  std::int64_t sums_of_piece() const { return rows_of_piece() * kernels::kSums * kernel_.columns; }
  std::int64_t sums_of_thread() const { return sums_of_piece() * (vectors_ ? 2 : 1); }
  std::int64_t scratch_of_thread() const { return std::max({kClassesAtATime, slots(*slots_a_), slots(*slots_b_)}); }
  double* scratch(int thread) { return scratch_.data() + thread * scratch_of_thread(); }

  Extent extent(const void* values, std::int64_t count, std::int64_t width, double* squares) {
    std::vector<Extent> parts(static_cast<std::size_t>(threads_));
    parallel_for((count + kRowsAtATime - 1) / kRowsAtATime, threads_, [&](std::int64_t block, int thread) {
      Extent& part = parts[static_cast<std::size_t>(thread)];
      T largest = 0;
      for (std::int64_t i = block * kRowsAtATime; i < std::min(count, (block + 1) * kRowsAtATime); ++i) {
        const double square = kernel_.square(static_cast<const T*>(values) + i * width, width, &largest);
        if (squares != nullptr) squares[i] = square;
        part.square += square;  // whether it is finite is all that is asked of it
      }
      part.largest = std::max(part.largest, static_cast<double>(largest));
    });
    Extent whole;
    for (const Extent& part : parts) whole = {whole.square + part.square, std::max(whole.largest, part.largest)};
    return whole;
  }

  // Sizes of features and reference. False: they have to be brought to a moderate size first.
  bool measure() {
    square_a_.resize(static_cast<std::size_t>(a_.count));
    square_b_.resize(static_cast<std::size_t>(columns_));
    Extent features = extent(a_.features, a_.count, p_.width, square_a_.data());
    if (same_) {
      std::copy(square_a_.begin(), square_a_.end(), square_b_.begin());
    } else {
      const Extent other = extent(b_.features, b_.count, p_.width, square_b_.data());
      features = {features.square + other.square, std::max(features.largest, other.largest)};
    }
    least_ = p_.least;
    if (p_.in_range) return true;
    const std::int64_t width = p_.width + (p_.bias ? 1 : 0);
    const Extent reference = extent(p_.reference, p_.classes, width, nullptr);
    if (p_.bias) features.largest = std::max(features.largest, 1.0);
    if (!features.moderate() || !reference.moderate()) return false;
    const double most = features.largest * reference.largest * static_cast<double>(std::max<std::int64_t>(1, width));
    least_ = most > 0 && features.finite() && reference.finite() ? kLeast<T> / most : 0.0;
    return true;
  }

  void reserve() {
    const auto size = [](std::int64_t count) { return static_cast<std::size_t>(count); };
    const std::int64_t left = rows_ * p_.classes * kernels::kLeft, right = columns_ * p_.classes * kernels::kRight;
    for (auto* const packed : {&left_, &left_beside_}) {
      if (packed == &left_ || vectors_) packed->resize(size(left));
    }
    for (auto* const packed : {&right_, &right_beside_}) {
      if (packed == &right_ || vectors_) packed->resize(size(right));
    }
    at_labels_a_.resize(size(a_.count * slots(*slots_b_)));
    at_labels_b_.resize(size(columns_ * slots(*slots_a_)));
    for (auto* const values : {&own_a_, &own_projected_a_}) values->resize(size(a_.count));
    for (auto* const values : {&own_b_, &own_projected_b_, &weighed_square_b_}) values->resize(size(columns_));
    if (vectors_) {
      for (auto* const values : {&own_beside_b_, &weighed_toward_b_, &weighed_beside_b_}) values->resize(size(columns_));
    }
    sums_.resize(size(threads_ * sums_of_thread()));
    scratch_.resize(size(threads_ * scratch_of_thread()));
  }

  // What does not depend on the mixing weight.
  void describe() {
    tops(a_, top_a_);
    if (same_) {
      top_b_ = top_a_;
    } else {
      tops(b_, top_b_);
    }
    for (auto* const places : {&class_b_, &slot_b_}) places->resize(static_cast<std::size_t>(columns_));
    label_b_.resize(static_cast<std::size_t>(columns_));
    std::copy(slots_b_->slots.begin(), slots_b_->slots.end(), slot_b_.begin());
    for (std::int64_t j = 0; j < b_.count; ++j) {
      label_b_[j] = static_cast<double>(b_.labels[j]);
      class_b_[j] = static_cast<std::int32_t>(b_.labels[j]);
    }
    if (!vectors_) return;
    products_of_vectors(a_, toward_a_, beside_a_);
    if (same_) {
      toward_b_ = toward_a_;
      beside_b_ = beside_a_;
    } else {
      products_of_vectors(b_, toward_b_, beside_b_);
    }
  }

  // Each sample's largest logit among the classes that are not its label.
  void tops(const Side<T>& side, std::vector<double>& top) const {
    top.resize(static_cast<std::size_t>(side.count));
    parallel_for((side.count + kRowsAtATime - 1) / kRowsAtATime, threads_, [&](std::int64_t block, int) {
      for (std::int64_t i = block * kRowsAtATime; i < std::min(side.count, (block + 1) * kRowsAtATime); ++i) {
        const T* const z = side.logits + i * p_.classes;
        T most = -std::numeric_limits<T>::infinity();
        for (std::int64_t c = 0; c < side.labels[i]; ++c) most = z[c] > most ? z[c] : most;
        for (std::int64_t c = side.labels[i] + 1; c < p_.classes; ++c) most = z[c] > most ? z[c] : most;
        top[static_cast<std::size_t>(i)] = p_.classes > 1 ? static_cast<double>(most) : 0.0;
      }
    });
  }

  // <t, u> and <t, t> of each sample.
  void products_of_vectors(const Side<T>& side, std::vector<double>& toward, std::vector<double>& square) const {
    for (auto* const values : {&toward, &square}) values->assign(static_cast<std::size_t>(side.count), 0.0);
    for (std::int64_t i = 0; i < side.count; ++i) {
      for (std::int64_t c = i * p_.classes; c < (i + 1) * p_.classes; ++c) {
        toward[i] += static_cast<double>(side.beside[c]) * side.projected[c];
        square[i] += static_cast<double>(side.beside[c]) * side.beside[c];
      }
    }
  }

  void weigh(double lam) {
    w_.lam = lam;
    w_.mu = 1.0 - lam;
    w_.unit = 1.0 / (kScale * kScale);
    w_.lost = kUnderflow * kScale * kScale;
    w_.matters = kUnderflow * static_cast<double>(p_.classes) * std::exp(kNegligible);
    w_.close = kClose<T>;
    w_.least = std::max(least_, kSmallest);
    w_.cancelled = kCancelled;
    w_.cross = w_.lam * w_.mu;
    w_.product_unit = p_.features_unit * p_.reference_unit;
    w_.features_unit = p_.features_unit;
    w_.classes = p_.classes;
    const double square = w_.mu * w_.mu;
    for (std::int64_t j = 0; j < b_.count; ++j) weighed_square_b_[j] = square * square_b_[j];
    if (!vectors_) return;
    for (std::int64_t j = 0; j < b_.count; ++j) {
      weighed_toward_b_[j] = square * toward_b_[j];
      weighed_beside_b_[j] = square * beside_b_[j];
    }
  }

  void pack() {
    parallel_for(rows_ / kernel_.rows, threads_, [&](std::int64_t block, int thread) { pack_left(block, scratch(thread)); });
    parallel_for(columns_ / kernel_.columns, threads_,
                 [&](std::int64_t panel, int thread) { pack_right(panel, scratch(thread)); });
  }

  void pack_left(std::int64_t block, double* e) {
    const std::int64_t rows = kernel_.rows, stride = rows * kernels::kLeft, first = block * rows;
    const std::int64_t valid = std::min(rows, a_.count - first);
    const T lam = static_cast<T>(w_.lam);
    // Classes outside: a sample's are written far from each other.
    for (std::int64_t start = 0; start < p_.classes; start += kClassesAtATime) {
      const std::int64_t count = std::min(kClassesAtATime, p_.classes - start);
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t i = first + r, from = i * p_.classes + start;
        if (r < valid) {
          kernel_.exponentials(a_.logits + from, top_a_[i], w_.lam, count, e);
          if (all_at_once()) choose(e, *slots_b_, at_labels_a_.data() + i * slots(*slots_b_), 1);
          own_a_[i] = take(e, a_.labels[i] - start, count, own_a_[i]);
        }
        const auto write = [&](T* out, const T* u) {
          for (std::int64_t c = 0; c < count; ++c) {
            const T exponential = r < valid ? static_cast<T>(e[c] * kScale) : T(0);
            T* const entry = out + c * stride;
            entry[0] = exponential;
            entry[1] = r < valid ? exponential * (lam * u[c]) : T(0);
            entry[2] = exponential * exponential;
          }
        };
        const std::int64_t to = (block * p_.classes + start) * stride + r * kernels::kLeft;
        write(left_.data() + to, a_.projected + from);
        if (vectors_) write(left_beside_.data() + to, a_.beside + from);
      }
    }
    for (std::int64_t i = first; i < first + valid; ++i) {
      own_projected_a_[i] = w_.lam * a_.projected[i * p_.classes + a_.labels[i]];
      if (all_at_once()) continue;
      at_classes(a_.logits + i * p_.classes, top_a_[i], w_.lam, *slots_b_, at_labels_a_.data() + i * slots(*slots_b_));
    }
  }

  void pack_right(std::int64_t panel, double* e) {
    const std::int64_t width = kernel_.columns, stride = width * kernels::kRight, first = panel * width;
    const std::int64_t valid = std::min(width, b_.count - first);
    const T mu = static_cast<T>(w_.mu);
    for (std::int64_t start = 0; start < p_.classes; start += kClassesAtATime) {
      const std::int64_t count = std::min(kClassesAtATime, p_.classes - start);
      for (std::int64_t r = 0; r < width; ++r) {
        const std::int64_t j = first + r, from = j * p_.classes + start;
        if (r < valid) {
          kernel_.exponentials(b_.logits + from, top_b_[j], w_.mu, count, e);
          if (all_at_once()) choose(e, *slots_a_, at_labels_b_.data() + j, columns_);
          own_b_[j] = take(e, b_.labels[j] - start, count, own_b_[j]);
        }
        const auto write = [&](T* out, const T* u) {
          for (std::int64_t c = 0; c < count; ++c) {
            out[c * stride] = r < valid ? static_cast<T>(e[c] * kScale) : T(0);
            out[c * stride + width] = r < valid ? mu * u[c] : T(0);
          }
        };
        const std::int64_t to = (panel * p_.classes + start) * stride + r;
        write(right_.data() + to, b_.projected + from);
        if (vectors_) write(right_beside_.data() + to, b_.beside + from);
      }
    }
    for (std::int64_t j = first; j < first + width; ++j) {
      if (j >= b_.count) {
        for (std::int64_t s = 0; s < slots(*slots_a_); ++s) at_labels_b_[s * columns_ + j] = 0.0;
        continue;
      }
      own_projected_b_[j] = w_.mu * b_.projected[j * p_.classes + b_.labels[j]];
      if (vectors_) own_beside_b_[j] = w_.mu * b_.beside[j * p_.classes + b_.labels[j]];
      if (all_at_once()) continue;
      at_classes(b_.logits + j * p_.classes, top_b_[j], w_.mu, *slots_a_, e);
      for (std::int64_t s = 0; s < slots(*slots_a_); ++s) at_labels_b_[s * columns_ + j] = e[s];
    }
  }

  // Whether a sample's exponentials of all classes are at hand together.
  bool all_at_once() const { return p_.classes <= kClassesAtATime; }

  static std::int64_t slots(const Labels& labels) { return static_cast<std::int64_t>(labels.classes.size()); }

  // The exponential at a sample's label, which becomes 0, if it is among `count`; else what is known of it.
  static double take(double* e, std::int64_t label, std::int64_t count, double known) {
    if (label < 0 || label >= count) return known;
    const double found = e[label];
    e[label] = 0.0;
    return found;
  }

  // The exponentials of the other side's classes, among those of all.
  static void choose(const double* e, const Labels& labels, double* out, std::int64_t stride) {
    for (std::int64_t s = 0; s < slots(labels); ++s) out[s * stride] = e[labels.classes[s]];
  }

  // Exponentials of one sample at the other side's classes.
  void at_classes(const T* z, double top, double weight, const Labels& labels, double* out) const {
    constexpr std::int64_t few = 64;
    T gathered[few];
    for (std::int64_t start = 0; start < slots(labels); start += few) {
      const std::int64_t count = std::min(few, slots(labels) - start);
      for (std::int64_t s = 0; s < count; ++s) gathered[s] = z[labels.classes[start + s]];
      kernel_.exponentials(gathered, top, weight, count, out + start);
    }
  }

  // All results of some rows against one panel of columns.
  void piece(std::int64_t panel, std::int64_t first_row, T* sums) {
    const std::int64_t width = kernel_.columns, stride = kernels::kSums * width;
    const std::int64_t end = std::min(first_row + rows_of_piece(), rows_);
    std::fill_n(sums, sums_of_thread(), T(0));
    const auto products = norm_ == nullptr ? kernel_.inner_products : kernel_.products;
    for (std::int64_t start = 0; start < p_.classes; start += kClassesAtATime) {
      const std::int64_t count = std::min(kClassesAtATime, p_.classes - start);
      const std::int64_t right = (panel * p_.classes + start) * kernels::kRight * width;
      for (std::int64_t i = first_row; i < end; i += kernel_.rows) {
        const std::int64_t left = (i * p_.classes + start * kernel_.rows) * kernels::kLeft;
        T* const to = sums + (i - first_row) * stride;
        products(left_.data() + left, right_.data() + right, count, to);
        if (vectors_) {
          kernel_.inner_products(left_beside_.data() + left, right_beside_.data() + right, count, to + sums_of_piece());
        }
      }
    }
    finish(panel, first_row, std::min(end, a_.count), sums);
  }

  // The results of some rows against one panel. Of the last panel only some columns are there, but what is read and written
  // is the whole panel's.
  void finish(std::int64_t panel, std::int64_t first_row, std::int64_t end_row, const T* sums) {
    const std::int64_t width = kernel_.columns, first = panel * width;
    const std::int64_t valid = std::min(width, b_.count - first);
    T read[3][kernels::kMostColumns] = {}, written[2][kernels::kMostColumns];
    double refused[kernels::kMostColumns];
    Row row{};
    row.other_own = own_b_.data() + first;
    row.other_own_projected = own_projected_b_.data() + first;
    row.other_label = label_b_.data() + first;
    row.other_class = class_b_.data() + first;
    row.other_slot = slot_b_.data() + first;
    row.other_square = weighed_square_b_.data() + first;
    row.refused = refused;
    Beside beside{};
    if (vectors_) {
      beside.other_own_vector = own_beside_b_.data() + first;
      beside.other_toward = weighed_toward_b_.data() + first;
      beside.other_square = weighed_beside_b_.data() + first;
    }
    const double square = w_.lam * w_.lam, bias = p_.bias ? 1.0 / (p_.features_unit * p_.features_unit) : 0.0;
    for (std::int64_t i = first_row; i < end_row; ++i, sums += kernels::kSums * width) {
      const std::int64_t at = i * b_.count + first, label = a_.labels[i];
      const std::int64_t other = (panel * p_.classes + label) * kernels::kRight * width + width;
      const auto input = [&](const void* matrix, T* copy) -> const T* {
        const T* const from = static_cast<const T*>(matrix) + at;
        return valid == width ? from : (std::copy_n(from, valid, copy), copy);
      };
      row.sums = sums;
      row.projected = a_.projected + i * p_.classes;
      row.at_labels = at_labels_a_.data() + i * slots(*slots_b_);
      row.own = own_a_[i];
      row.own_projected = own_projected_a_[i];
      row.label = static_cast<double>(label);
      row.square = square * square_a_[i] + bias;
      row.other_at_label = at_labels_b_.data() + slots_a_->slots[i] * columns_ + first;
      row.other_projected = right_.data() + other;
      row.inner = valid == width ? inner_ + at : written[0];
      if (norm_ != nullptr) {
        row.gram = input(p_.gram, read[0]);
        row.norm = valid == width ? norm_ + at : written[1];
      }
      if (vectors_) {
        beside.sums = sums + sums_of_piece();
        beside.vector = a_.beside + i * p_.classes;
        beside.own_vector = w_.lam * beside.vector[label];
        beside.other_vector = right_beside_.data() + other;
        beside.toward = square * toward_a_[i];
        beside.square = square * beside_a_[i];
        beside.cross_toward = input(p_.toward, read[1]);
        beside.cross_square = input(p_.beside, read[2]);
      }
      if (kernel_.finish(w_, row, beside)) {
        for (std::int64_t j = 0; j < valid; ++j) {
          if (refused[j] != 0.0) alone(i, first + j, row, j);
        }
      }
      if (valid == width) continue;
      std::copy_n(written[0], valid, inner_ + at);
      if (norm_ != nullptr) std::copy_n(written[1], valid, norm_ + at);
    }
  }

  // One pair in double, through the logarithms of the labels' terms: nothing underflows and nothing cancels.
  void alone(std::int64_t i, std::int64_t j, const Row& row, std::int64_t column) const {
    const T* const z_a = a_.logits + i * p_.classes;
    const T* const z_b = b_.logits + j * p_.classes;
    const std::int64_t own = a_.labels[i], other = b_.labels[j];
    const double lam = w_.lam, mu = w_.mu;
    const bool different = own != other;
    const auto mixed = [&](std::int64_t c) { return lam * z_a[c] + mu * z_b[c]; };
    double top = -kInfinity, rest = 0.0;
    for (std::int64_t c = 0; c < p_.classes; ++c) {
      if (c != own && c != other) top = std::max(top, mixed(c));
    }
    if (top == -kInfinity) top = 0.0;  // no other class is there
    for (std::int64_t c = 0; c < p_.classes; ++c) {
      if (c != own && c != other) rest += std::exp(mixed(c) - top);
    }
    const double log_own = mixed(own) - top, log_other = mixed(other) - top;
    const double first = log_own + std::log(mu), second = log_other + std::log(lam);
    // D = mu exp(own) - lam exp(other): its larger term times 1 - exp(-|the logarithm of their ratio|), and a sign.
    const double larger = different ? std::max(first, second) : -kInfinity;
    const double unit = std::max({larger, std::log(rest), -1e30});
    double difference = 0.0;
    if (different) {
      difference = -std::expm1(-std::fabs(first - second)) * std::exp(larger - unit);
      if (first < second) difference = -difference;
    }
    const double scale = std::min(std::exp(-unit), 1e35), share = rest * scale;
    const double whole = std::exp(log_own - unit) + (different ? std::exp(log_other - unit) : 0.0) + share;
    const double size = std::max(1.0 / whole, std::numeric_limits<double>::min());
    const double at_own = (different ? difference - lam * share : -share) * size;
    const double at_other = -(difference + mu * share) * size;

    const auto both = [&](const T* left, const T* right, std::int64_t c) {
      return lam * left[i * p_.classes + c] + mu * right[j * p_.classes + c];
    };
    const auto residual = [&](std::int64_t c) {
      const double r = c == own ? at_own : c == other ? at_other
                                                      : std::exp(mixed(c) - top) * scale * size;
      return vectors_ ? r + both(a_.beside, b_.beside, c) : r;
    };
    double product = 0.0, square = 0.0, largest = 0.0;
    for (std::int64_t c = 0; c < p_.classes; ++c) {
      const double r = residual(c);
      product += r * both(a_.projected, b_.projected, c);
      largest = std::max(largest, std::fabs(r));
    }
    // In units of the largest: no square leaves the range.
    const double inverse = largest == 0.0 ? 1.0 : 1.0 / largest, held = std::max(1.0, least_ * inverse);
    row.inner[column] = static_cast<T>(product * held * w_.product_unit);
    if (row.gram == nullptr) return;
    for (std::int64_t c = 0; c < p_.classes; ++c) square += std::pow(residual(c) * inverse, 2);
    const double features = row.square + row.other_square[column] + 2.0 * w_.cross * row.gram[column];
    const double length = std::sqrt(square) * largest * held * std::sqrt(std::max(0.0, features));
    row.norm[column] = static_cast<T>(length * w_.features_unit);
  }

  const MixedAlignment& p_;
  const Side<T> a_, b_;
  const kernels::Functions<T>& kernel_;
  int threads_;
  const std::int64_t rows_;     // of the first side, in whole tiles
  const std::int64_t columns_;  // of the second side, likewise
  const bool vectors_;          // whether labels are vectors
  const bool same_;             // whether both sides are the same samples
  const Labels* slots_a_ = nullptr;
  const Labels* slots_b_ = nullptr;
  double least_ = 0;
  kernels::Weights w_{};
  T* inner_ = nullptr;
  T* norm_ = nullptr;
  Unset<T> left_, left_beside_;        // packed tiles of the first side
  Unset<T> right_, right_beside_;      // and panels of the second
  Unset<double> at_labels_a_;          // (a.count, classes of b's labels)
  Unset<double> at_labels_b_;          // (classes of a's labels, columns)
  std::vector<double> top_a_, top_b_;  // by sample from here on, the second side's up to the last panel's end
  std::vector<double> square_a_, square_b_, weighed_square_b_;
  std::vector<double> own_a_, own_projected_a_, own_b_, own_projected_b_, own_beside_b_;
  std::vector<double> toward_a_, toward_b_, beside_a_, beside_b_, weighed_toward_b_, weighed_beside_b_;
  std::vector<double> label_b_;
  std::vector<std::int32_t> class_b_, slot_b_;
  Unset<T> sums_;
  Unset<double> scratch_;
};

}  // namespace

bool mixed_alignment(const MixedAlignment& problem, int threads) {
  const kernels::Table& table = GRADMIX_KERNELS(kernels);
  if (problem.dtype == Dtype::kFloat64) return Run<double>(problem, table.float64, threads)();
  return Run<float>(problem, table.float32, threads)();
}

}  // namespace gradmix
