// See mixed_alignment_kernel.hpp. GRADMIX_LEVEL names the instruction set, GRADMIX_VECTOR_BYTES is its register width.
#include "mixed_alignment_kernel.hpp"

#include "simd.hpp"

namespace gradmix::mixed_alignment_kernel {

using namespace kernel;

namespace {

// Accumulators are kRows by kSums: 24 of 32 registers, or 9 of 16. One vector of columns, so that a number of the first side
// is used once and may come from memory; where it takes a register, there are fewer rows.
constexpr int kRows = GRADMIX_VECTOR_BYTES == 64 ? 8 : 3;
template <typename T>
constexpr int kColumns = Simd<T>::lanes;
static_assert(kColumns<float> <= kMostColumns);

template <typename T, bool Squares>
void products(const T* left, const T* right, std::int64_t count, T* sums) {
  using V = typename Simd<T>::Vector;
  using U = typename Simd<T>::Unaligned;
  constexpr int used = Squares ? kSums : kSums - 1, columns = kColumns<T>;
  // From zero, and added to the sums at the end: the rounding of a sum over many classes stays that of short sums.
  V total[kRows][used] = {};
  for (std::int64_t c = 0; c < count; ++c) {
    const T* const l = left + c * kRows * kLeft;
    const T* const r = right + c * kRight * columns;
    const V exponential = *reinterpret_cast<const U*>(r);
    const V projected = exponential * *reinterpret_cast<const U*>(r + columns);
    [[maybe_unused]] const V square = exponential * exponential;
    GRADMIX_UNROLL
    for (int i = 0; i < kRows; ++i) {
      total[i][0] += exponential * l[i * kLeft];
      total[i][1] += exponential * l[i * kLeft + 1];
      total[i][1] += projected * l[i * kLeft];
      if constexpr (Squares) total[i][2] += square * l[i * kLeft + 2];
    }
  }
  GRADMIX_UNROLL
  for (int i = 0; i < kRows; ++i) {
    GRADMIX_UNROLL
    for (int s = 0; s < used; ++s) *reinterpret_cast<U*>(sums + (i * kSums + s) * columns) += total[i][s];
  }
}

using Double = Simd<double>::Vector;
constexpr int kDoubles = Simd<double>::lanes;

Double load(const double* from) { return *reinterpret_cast<const Simd<double>::Unaligned*>(from); }

void store(double* to, Double value) { *reinterpret_cast<Simd<double>::Unaligned*>(to) = value; }

#if defined(__GNUC__)
typedef std::uint64_t Bits __attribute__((vector_size(GRADMIX_VECTOR_BYTES)));
typedef float Floats __attribute__((vector_size(GRADMIX_VECTOR_BYTES / 2)));
typedef float UnalignedFloats __attribute__((vector_size(GRADMIX_VECTOR_BYTES / 2), aligned(alignof(float)), may_alias));

Double load(const float* from) {
  return __builtin_convertvector(static_cast<Floats>(*reinterpret_cast<const UnalignedFloats*>(from)), Double);
}

void store(float* to, Double value) {
  *reinterpret_cast<UnalignedFloats*>(to) = __builtin_convertvector(value, Floats);
}

Double root(Double value) {
  for (int lane = 0; lane < kDoubles; ++lane) value[lane] = __builtin_sqrt(value[lane]);
  return value;
}
#else
using Bits = std::uint64_t;
Double load(const float* from) { return *from; }
void store(float* to, Double value) { *to = static_cast<float>(value); }
Double root(Double value) { return __builtin_sqrt(value); }
#endif

// exp(x) = 2^k exp(r) with k the integer nearest to x / ln 2, and the exponential series of r, |r| <= 0.347.
// Below -708 it is 0, and above 709 infinite.
inline Double exponential(Double x) {
  const Double zero{}, infinity = zero + __builtin_inf();
  constexpr double magic = 0x1.8p52;  // a number added to this is rounded to an integer, which its last bits show
  const Double shifted = x * 0x1.71547652b82fep0 + magic;
  const Double k = shifted - magic;
  const Double r = (x - k * 0x1.62e42fefa0000p-1) - k * 0x1.cf79abc9e3b3ap-40;
  Double series = zero + 1.0 / 6227020800.0;
  series = series * r + 1.0 / 479001600.0;
  series = series * r + 1.0 / 39916800.0;
  series = series * r + 1.0 / 3628800.0;
  series = series * r + 1.0 / 362880.0;
  series = series * r + 1.0 / 40320.0;
  series = series * r + 1.0 / 5040.0;
  series = series * r + 1.0 / 720.0;
  series = series * r + 1.0 / 120.0;
  series = series * r + 1.0 / 24.0;
  series = series * r + 1.0 / 6.0;
  series = series * r + 0.5;
  series = series * r + 1.0;
  series = series * r + 1.0;
  Bits bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 1023) << 52;
  Double power;
  __builtin_memcpy(&power, &bits, sizeof power);
  const Double result = series * power;
  return x < zero - 708.0 ? zero : x > zero + 709.0 ? infinity
                                                    : result;
}

template <typename T>
void exponentials(const T* z, double top, double weight, std::int64_t count, double* out) {
  std::int64_t c = 0;
  for (; c + kDoubles <= count; c += kDoubles) store(out + c, exponential((load(z + c) - top) * weight));
  if (c == count) return;
  T rest[kDoubles] = {};
  double values[kDoubles];
  for (int lane = 0; c + lane < count; ++lane) rest[lane] = z[c + lane];
  store(values, exponential((load(rest) - top) * weight));
  for (int lane = 0; c + lane < count; ++lane) out[c + lane] = values[lane];
}

template <typename T>
Double gather(const T* from, const std::int32_t* places) {
  double values[kDoubles];
  for (int lane = 0; lane < kDoubles; ++lane) values[lane] = from[places[lane]];
  return load(values);
}

// In double: D needs its digits, and no square or quotient leaves the range.
template <typename T, bool Norms, bool Vectors>
bool finish(const Weights& w, const Row<T>& row, [[maybe_unused]] const Beside<T>& beside) {
  constexpr int columns = kColumns<T>;
  const Double zero{}, one = zero + 1.0;
  const double lam = w.lam, mu = w.mu, unit = w.unit;
  // Whether there is a class beside the labels', where these are two and where they are one.
  const Double others = zero + (w.classes > 2 ? 1.0 : 0.0), others_of_one = zero + (w.classes > 1 ? 1.0 : 0.0);
  Double any = zero;
  for (int j = 0; j < columns; j += kDoubles) {
    const Double different = load(row.other_label + j) == zero + row.label ? zero : one;
    const Double rest = load(row.sums + j), share = rest * unit;
    const Double own = load(row.other_at_label + j) * row.own;
    const Double other_alone = gather(row.at_labels, row.other_slot + j) * load(row.other_own + j);
    const Double other = different == zero ? zero : other_alone;
    const Double first = own * mu, second = other * lam;
    const Double difference = (first - second) * different;
    const Double at_own = difference - share * (one - different * mu);
    const Double at_other = -(difference + share * different * mu);
    const Double whole = own + other + share;
    const Double inverse = one / whole;

    const Double u_own = load(row.other_projected + j) + row.own_projected;
    const Double u_other = load(row.other_own_projected + j) + gather(row.projected, row.other_class + j) * lam;
    Double product = (load(row.sums + columns + j) * unit + at_own * u_own + at_other * u_other) * inverse;
    [[maybe_unused]] Double square = zero;
    Double kept = one;
    if constexpr (Norms) {
      square = load(row.sums + 2 * columns + j) * (unit * unit) + at_own * at_own + at_other * at_other;
      square *= inverse * inverse;
    }
    if constexpr (Vectors) {
      const Double t_own = load(beside.other_vector + j) + beside.own_vector;
      const Double t_other = load(beside.other_own_vector + j) + gather(beside.vector, row.other_class + j) * lam;
      const Double both = load(beside.sums + columns + j) * unit + at_own * t_own + at_other * t_other;
      const Double second_square = load(beside.other_square + j) + load(beside.cross_square + j) * w.cross + beside.square;
      const Double parts = square + second_square;
      product += load(beside.other_toward + j) + load(beside.cross_toward + j) * w.cross + beside.toward;
      square = parts + both * inverse * 2.0;
      kept = square >= parts * w.cancelled ? one : zero;
    }
    store(row.inner + j, product * w.product_unit);
    if constexpr (Norms) {
      const Double mixed = load(row.other_square + j) + load(row.gram + j) * (2.0 * w.cross) + row.square;
      const Double length = (square < zero ? zero : square) * (mixed < zero ? zero : mixed);
      store(row.norm + j, root(length) * w.features_unit);
    }

    // Written so that what is not a number is refused. A product of 0 may have had an infinite partner, but for rounding.
    const Double magnitude = difference < zero ? -difference : difference;
    const Double measure = magnitude > share ? magnitude : share;
    const Double larger = (first > second ? first : second) * different;
    const Double besides = different == zero ? others_of_one : others;
    const Double lost = (rest < zero + w.lost ? besides : zero) * (larger < zero + w.matters ? one : zero);
    const Double smallest = different == zero ? zero + w.least : zero + w.close;
    const Double serves = (measure >= smallest * whole ? kept : zero) * (measure > zero + 1e-140 ? one : zero) *
                          (whole < zero + 1e140 ? one - lost : zero) * (own > zero ? one : zero) *
                          (other_alone > zero ? one : zero);
    const Double refused = one - serves;
    store(row.refused + j, refused);
    any += refused;
  }
  double values[kDoubles], total = 0;
  store(values, any);
  for (int lane = 0; lane < kDoubles; ++lane) total += values[lane];
  return total > 0;
}

template <typename T>
bool finish_row(const Weights& weights, const Row<T>& row, const Beside<T>& beside) {
  if (beside.sums != nullptr) return finish<T, true, true>(weights, row, beside);
  return row.gram == nullptr ? finish<T, false, false>(weights, row, beside) : finish<T, true, false>(weights, row, beside);
}

template <typename T>
double square(const T* x, std::int64_t count, T* largest) {
  constexpr int parts = 4;
  constexpr int step = parts * kDoubles;
  const Double zero{};
  Double sums[parts] = {}, most[parts] = {};
  const auto add = [&](const T* from) {
    GRADMIX_UNROLL
    for (int p = 0; p < parts; ++p) {
      const Double value = load(from + p * kDoubles), magnitude = value < zero ? -value : value;
      sums[p] += value * value;
      most[p] = magnitude > most[p] ? magnitude : most[p];
    }
  };
  std::int64_t c = 0;
  for (; c + step <= count; c += step) add(x + c);
  T rest[step] = {};
  for (int k = 0; c < count; ++c, ++k) rest[k] = x[c];
  add(rest);
  double total = 0, found = *largest;
  for (int p = 0; p < parts; ++p) {
    double values[kDoubles];
    store(values, sums[p]);
    for (int lane = 0; lane < kDoubles; ++lane) total += values[lane];
    store(values, most[p]);
    for (int lane = 0; lane < kDoubles; ++lane) found = values[lane] > found ? values[lane] : found;
  }
  *largest = static_cast<T>(found);
  return total;
}

template <typename T>
constexpr Functions<T> functions() {
  return {kRows, kColumns<T>, products<T, true>, products<T, false>, exponentials<T>, finish_row<T>, square<T>};
}

}  // namespace

const Table& GRADMIX_LEVEL() {
  static const Table table{functions<float>(), functions<double>()};
  return table;
}

}  // namespace gradmix::mixed_alignment_kernel
