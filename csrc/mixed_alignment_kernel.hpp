// The inner kernels of mixed_alignment, compiled once per instruction set; the one the machine has is picked when it runs.
//
// No standard header with code in it may be included here or in the kernel's source: an inline function compiled for a
// newer instruction set could be the copy that the linker keeps for everybody.
#pragma once

#include <cstdint>

namespace gradmix::mixed_alignment_kernel {

constexpr int kSums = 3;   // of a pair over the classes but the labels': R, that of its terms times u, and of their squares
constexpr int kLeft = 3;   // numbers that a class has in a packed sample of the first side: A, lam A u, A^2
constexpr int kRight = 2;  // of the second side: B, mu u
constexpr int kMostColumns = 16;

// What does not depend on the pair, of one mixing weight.
struct Weights {
  double lam;
  double mu;
  double unit;           // of R: that of A times that of B, inverted
  double lost;           // R below this, in its unit, may have lost its digits
  double matters;        // ... and matters where the labels' terms are below this
  double close;          // D below this share of the whole has lost too many digits
  double least;          // residuals are not smaller than this
  double cancelled;      // ||r||^2 below this share of its parts' has lost too many digits
  double cross;          // lam mu
  double product_unit;   // results are multiplied by
  double features_unit;
  std::int64_t classes;
};

// One sample of the first side against a panel of samples of the second, of as many entries as the tile has columns.
template <typename T>
struct Row {
  const T* sums;            // (kSums, columns) of `products`
  const T* projected;       // (classes,) u of the sample
  const double* at_labels;  // exponentials of the sample at the second side's classes
  double own;               // its exponential at its own label
  double own_projected;     // lam u there
  double label;
  double square;            // lam^2 ||h||^2, and the bias
  const double* other_own;            // exponential at its own label
  const double* other_own_projected;  // mu u there
  const double* other_at_label;       // exponential at the first sample's label
  const T* other_projected;           // mu u there
  const double* other_label;
  const std::int32_t* other_class;
  const std::int32_t* other_slot;     // of its class in `at_labels`
  const double* other_square;         // mu^2 ||h||^2
  const T* gram;                      // null: no norms
  T* inner;
  T* norm;
  double* refused;                    // 1 where the pair's numbers do not serve, else 0
};

// What the same sample and panel have where labels are vectors: t is what these lack to the one-hot vectors of their largest
// entries, and takes the place of u.
template <typename T>
struct Beside {
  const T* sums;                   // null: labels are classes
  const T* vector;                 // (classes,) t of the sample
  double own_vector;               // lam t at its own label
  const double* other_own_vector;  // mu t at its own label
  const T* other_vector;           // mu t at the first sample's label
  double toward;                   // lam^2 <t, u>
  double square;                   // lam^2 <t, t>
  const double* other_toward;      // mu^2 <t, u>
  const double* other_square;      // mu^2 <t, t>
  const T* cross_toward;           // <t, u> of the one with the other, and the other way round
  const T* cross_square;           // <t, t>, twice
};

template <typename T>
struct Functions {
  // A tile of `products`: samples of the first side by samples of the second.
  int rows;
  int columns;
  // Adds to the (rows, kSums, columns) sums those over `count` classes of a packed tile: left (count, rows, kLeft), right
  // (count, kRight, columns).
  void (*products)(const T* left, const T* right, std::int64_t count, T* sums);
  // The same without the squares.
  void (*inner_products)(const T* left, const T* right, std::int64_t count, T* sums);
  // out = exp(weight (z - top)); 0 of less than -708, and infinite of more than 709.
  void (*exponentials)(const T* z, double top, double weight, std::int64_t count, double* out);
  // Writes the row's results; whether any pair is refused.
  bool (*finish)(const Weights& weights, const Row<T>& row, const Beside<T>& beside);
  // The sum of squares, and the largest magnitude.
  double (*square)(const T* x, std::int64_t count, T* largest);
};

struct Table {
  Functions<float> float32;
  Functions<double> float64;
};

const Table& base();
const Table& avx2();
const Table& avx512();

}  // namespace gradmix::mixed_alignment_kernel
