// See class_sketch_kernel.hpp. GRADMIX_LEVEL names the instruction set, GRADMIX_VECTOR_BYTES is its register width.
#include "class_sketch_kernel.hpp"

#include "simd.hpp"

namespace gradmix::class_sketch_kernel {

using namespace kernel;

namespace {

// Sixteen accumulators where there are 32 registers, eight where there are 16: enough to hide the latency of a
// multiply-add, and never spilt.
constexpr int kAccumulators = GRADMIX_VECTOR_BYTES == 64 ? 16 : 8;

// One register tile: KB rows of the output by JV vectors.
template <typename T, int KB, int JV>
void tile(const T* deltas, std::int64_t delta_stride, const T* activations, std::int64_t activation_stride,
          const std::int64_t* rows, bool rows_are_packed, std::int64_t count, T* out, std::int64_t out_stride,
          bool accumulate) {
  using V = typename Simd<T>::Vector;
  using U = typename Simd<T>::Unaligned;
  constexpr int lanes = Simd<T>::lanes;
  V sum[KB][JV];
  GRADMIX_UNROLL
  for (int k = 0; k < KB; ++k) {
    GRADMIX_UNROLL
    for (int v = 0; v < JV; ++v) {
      if (accumulate) {
        sum[k][v] = *reinterpret_cast<const U*>(out + k * out_stride + v * lanes);
      } else {
        sum[k][v] = V{};
      }
    }
  }
  for (std::int64_t r = 0; r < count; ++r) {
    const T* const d = deltas + rows[r] * delta_stride;
    const T* const a = activations + (rows_are_packed ? r : rows[r]) * activation_stride;
    V column[JV];
    GRADMIX_UNROLL
    for (int v = 0; v < JV; ++v) column[v] = *reinterpret_cast<const U*>(a + v * lanes);
    GRADMIX_UNROLL
    for (int k = 0; k < KB; ++k) {
      GRADMIX_UNROLL
      for (int v = 0; v < JV; ++v) sum[k][v] += column[v] * d[k];
    }
  }
  GRADMIX_UNROLL
  for (int k = 0; k < KB; ++k) {
    GRADMIX_UNROLL
    for (int v = 0; v < JV; ++v) *reinterpret_cast<U*>(out + k * out_stride + v * lanes) = sum[k][v];
  }
}

// A panel of JV vectors of columns, all rows of the output: tiles of KB rows, then of fewer.
template <typename T, int KB, int JV>
void panel(const Block<T>& b, const T* activations, std::int64_t activation_stride, bool rows_are_packed, T* out,
           std::int64_t out_stride, std::int64_t k = 0) {
  for (; k + KB <= b.k; k += KB) {
    tile<T, KB, JV>(b.deltas + k, b.delta_stride, activations, activation_stride, b.rows, rows_are_packed, b.count,
                    out + k * out_stride, out_stride, b.accumulate);
  }
  if constexpr (KB > 1) {
    if (k < b.k) panel<T, KB / 2, JV>(b, activations, activation_stride, rows_are_packed, out, out_stride, k);
  }
}

// The last columns, fewer than a vector: copied side by side with zeros behind, so that whole vectors can be loaded.
template <typename T>
void last_columns(const Block<T>& b, std::int64_t j) {
  constexpr int lanes = Simd<T>::lanes;
  const std::int64_t width = b.j - j;
  for (std::int64_t r = 0; r < b.count; ++r) {
    const T* const a = b.activations + b.rows[r] * b.activation_stride + j;
    T* const to = b.scratch + r * lanes;
    for (std::int64_t c = 0; c < lanes; ++c) to[c] = c < width ? a[c] : T(0);
  }
  constexpr int strip = 16;
  T part[strip * lanes];
  for (std::int64_t k = 0; k < b.k; k += strip) {
    Block<T> rows = b;
    rows.deltas = b.deltas + k;
    rows.k = b.k - k < strip ? b.k - k : strip;
    T* const out = b.out + k * b.out_stride + j;
    if (b.accumulate) {
      for (std::int64_t i = 0; i < rows.k; ++i) {
        for (std::int64_t c = 0; c < lanes; ++c) part[i * lanes + c] = c < width ? out[i * b.out_stride + c] : T(0);
      }
    }
    panel<T, kAccumulators, 1>(rows, b.scratch, lanes, true, part, lanes);
    for (std::int64_t i = 0; i < rows.k; ++i) {
      for (std::int64_t c = 0; c < width; ++c) out[i * b.out_stride + c] = part[i * lanes + c];
    }
  }
}

template <typename T>
void block(const Block<T>& b) {
  constexpr int lanes = Simd<T>::lanes;
  std::int64_t j = 0;
  for (; j + 2 * lanes <= b.j; j += 2 * lanes) {
    panel<T, kAccumulators / 2, 2>(b, b.activations + j, b.activation_stride, false, b.out + j, b.out_stride);
  }
  for (; j + lanes <= b.j; j += lanes) {
    panel<T, kAccumulators, 1>(b, b.activations + j, b.activation_stride, false, b.out + j, b.out_stride);
  }
  if (j < b.j) last_columns(b, j);
}

// Row by row in T, and the rows' sums in double: no sum grows so long that its end is lost.
template <typename T>
double take(const T* product, std::int64_t stride, std::int64_t rows, std::int64_t columns, T* out,
            std::int64_t out_stride) {
  using V = typename Simd<T>::Vector;
  using U = typename Simd<T>::Unaligned;
  constexpr int lanes = Simd<T>::lanes;
  double total = 0;
  for (std::int64_t k = 0; k < rows; ++k) {
    const T* const from = product + k * stride;
    T* const to = out == nullptr ? nullptr : out + k * out_stride;
    V squares{};
    std::int64_t j = 0;
    for (; j + lanes <= columns; j += lanes) {
      const V value = *reinterpret_cast<const U*>(from + j);
      squares += value * value;
      if (to != nullptr) *reinterpret_cast<U*>(to + j) += value;
    }
    T rest = 0;
    for (; j < columns; ++j) {
      rest += from[j] * from[j];
      if (to != nullptr) to[j] += from[j];
    }
    T parts[lanes];
    *reinterpret_cast<U*>(parts) = squares;
    for (int lane = 0; lane < lanes; ++lane) rest += parts[lane];
    total += rest;
  }
  return total;
}

}  // namespace

const Table& GRADMIX_LEVEL() {
  static const Table table{block<float>, block<double>, take<float>, take<double>, from_bfloat16, from_float16};
  return table;
}

}  // namespace gradmix::class_sketch_kernel
