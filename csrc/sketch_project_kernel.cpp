// See sketch_project_kernel.hpp. GRADMIX_LEVEL names the instruction set, GRADMIX_VECTOR_BYTES is its register width.
//
// A register holds one column's entries at neighbouring positions. Four columns have only 16 signed sums, +-a +-b +-c +-d,
// and every row of the matrix adds one of them: so the 16 are computed once, kept in the first cache, and each row looks its
// own up by the four bits that the generator yields for it. That is one addition for a row and four columns instead of
// four, and the matrix is never more than those bits.
#include "sketch_project_kernel.hpp"

#include "counter_random.hpp"
#include "simd.hpp"

namespace gradmix::sketch_project_kernel {

using namespace kernel;

namespace {

constexpr int kColumns = 64;             // at a time: their tables take a part of the first cache
constexpr int kGroups = kColumns / 4;    // of four columns, which share a counter of the generator
constexpr int kSums = 16;                // signed sums of a group
constexpr std::int64_t kWideRow = 1024;  // columns from which on the rows of one piece do not stay in the second cache
constexpr int kRows = GRADMIX_VECTOR_BYTES == 64 ? 16 : 8;  // of the matrix at a time, a register each

// Integers that name the lanes of a register.
template <typename T>
struct Index;
#if defined(__GNUC__)
template <>
struct Index<float> {
  typedef std::int32_t Vector __attribute__((vector_size(GRADMIX_VECTOR_BYTES)));
};
template <>
struct Index<double> {
  typedef std::int64_t Vector __attribute__((vector_size(GRADMIX_VECTOR_BYTES)));
};
#endif

template <typename T>
using Vector = typename Simd<T>::Vector;
template <typename T>
using Unaligned = typename Simd<T>::Unaligned;

// ------------------------------------------------------------------------------------------------------------- loading

inline Vector<float> load(const float* from) { return *reinterpret_cast<const Unaligned<float>*>(from); }
inline Vector<double> load(const double* from) { return *reinterpret_cast<const Unaligned<double>*>(from); }

// The half types as they lie in memory.
struct Bfloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

// As from_bfloat16 and from_float16, but one register as a whole: of a loop over its lanes GCC makes single conversions.
#if defined(__GNUC__)
typedef std::uint16_t Halves __attribute__((vector_size(GRADMIX_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef std::uint32_t Bits __attribute__((vector_size(GRADMIX_VECTOR_BYTES)));

inline Bits load_bits(const void* from) { return __builtin_convertvector(*static_cast<const Halves*>(from), Bits); }

inline Vector<float> load(const Bfloat16* from) { return reinterpret_cast<Vector<float>>(load_bits(from) << 16); }

inline Vector<float> load(const Float16* from) {
  const Bits half = load_bits(from);
  const Vector<float> magnitude = reinterpret_cast<Vector<float>>((half & 0x7fffu) << 13) * 0x1p112f;
  const Bits special = reinterpret_cast<Bits>((half & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return reinterpret_cast<Vector<float>>(reinterpret_cast<Bits>(magnitude) | special | (half & 0x8000u) << 16);
}
#else
inline Vector<float> load(const Bfloat16* from) {
  float to;
  from_bfloat16(&from->bits, &to, 1);
  return to;
}

inline Vector<float> load(const Float16* from) {
  float to;
  from_float16(&from->bits, &to, 1);
  return to;
}
#endif

inline float value(const float* from) { return *from; }
inline double value(const double* from) { return *from; }
inline float value(const Bfloat16* from) {
  float to;
  from_bfloat16(&from->bits, &to, 1);
  return to;
}
inline float value(const Float16* from) {
  float to;
  from_float16(&from->bits, &to, 1);
  return to;
}

// ------------------------------------------------------------------------------------------------------- transposition

// As many registers as one has lanes, turned about their diagonal, in steps that swap blocks of 1, 2, 4, ... entries.
template <typename T>
inline void transpose(Vector<T>* v) {
  constexpr int lanes = Simd<T>::lanes;
#if defined(__GNUC__) && !defined(__clang__)
  typename Index<T>::Vector low, high;
  GRADMIX_UNROLL
  for (int width = 1; width < lanes; width *= 2) {
    GRADMIX_UNROLL
    for (int lane = 0; lane < lanes; ++lane) {
      low[lane] = lane & width ? lanes + lane - width : lane;
      high[lane] = lane & width ? lanes + lane : lane + width;
    }
    GRADMIX_UNROLL
    for (int i = 0; i < lanes; ++i) {
      if (i & width) continue;
      const Vector<T> a = v[i], b = v[i + width];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + width] = __builtin_shuffle(a, b, high);
    }
  }
#else
  T square[lanes][lanes];
  for (int i = 0; i < lanes; ++i) *reinterpret_cast<Unaligned<T>*>(square[i]) = v[i];
  for (int i = 0; i < lanes; ++i) {
    T row[lanes];
    for (int lane = 0; lane < lanes; ++lane) row[lane] = square[lane][i];
    v[i] = *reinterpret_cast<const Unaligned<T>*>(row);
  }
#endif
}

// ------------------------------------------------------------------------------------------------------------ the parts

// For each group of columns and row of the matrix, where in the group's table its sum lies, in bytes.
struct Places {
  std::uint16_t at[kGroups][kRankBlock];
};

void find_places(const Piece& p, std::int64_t first_group, std::int64_t first_row, std::int64_t rows, Places& places) {
  for (std::int64_t word = 0; word * kRademacherRows < rows; ++word) {
    std::uint32_t words[4][kGroups];
    const auto group_of_rows = static_cast<std::uint32_t>(first_row / kRademacherRows + word);
    for (int g = 0; g < kGroups; ++g) {
      const RandomWords random = random_words(first_group + g, group_of_rows, kRademacherStream, p.key);
      for (int c = 0; c < 4; ++c) words[c][g] = random.word[c];
    }
    for (int g = 0; g < kGroups; ++g) {
      std::uint16_t* const to = places.at[g] + word * kRademacherRows;
      const std::uint32_t w0 = words[0][g], w1 = words[1][g], w2 = words[2][g], w3 = words[3][g];
      for (int i = 0; i < kRademacherRows; ++i) {
        const std::uint32_t bits = (w0 >> i & 1) | (w1 >> i & 1) << 1 | (w2 >> i & 1) << 2 | (w3 >> i & 1) << 3;
        to[i] = static_cast<std::uint16_t>(bits * GRADMIX_VECTOR_BYTES);
      }
    }
  }
}

// The table of one group: bit c of the place tells the sign of column c.
template <typename T>
inline void fill_table(Vector<T> a, Vector<T> b, Vector<T> c, Vector<T> d, Vector<T>* table) {
  using V = Vector<T>;
  const V low[4] = {-a - b, a - b, b - a, a + b};
  const V high[4] = {-c - d, c - d, d - c, c + d};
  GRADMIX_UNROLL
  for (int i = 0; i < 4; ++i) {
    GRADMIX_UNROLL
    for (int j = 0; j < 4; ++j) table[4 * i + j] = low[j] + high[i];
  }
}

// Adds to sums[i], or begins it with, what row i finds in the tables: kRows rows at a time, then fewer.
template <typename T, int Rows>
inline void look_up(const Vector<T>* tables, const Places& places, int groups, std::int64_t rows, bool begins,
                    Vector<T>* sums, std::int64_t row = 0) {
  using V = Vector<T>;
  for (; row + Rows <= rows; row += Rows) {
    V sum[Rows];
    GRADMIX_UNROLL
    for (int i = 0; i < Rows; ++i) sum[i] = begins ? V{} : sums[row + i];
    const std::uint16_t* at = places.at[0] + row;
    const char* table = reinterpret_cast<const char*>(tables);
    for (int g = 0; g < groups; ++g, at += kRankBlock, table += kSums * sizeof(V)) {
#if defined(__GNUC__)
      __asm__("" : "+r"(at));  // else GCC keeps a pointer for every row, most of them in memory
#endif
      GRADMIX_UNROLL
      for (int i = 0; i < Rows; ++i) sum[i] += *reinterpret_cast<const V*>(table + at[i]);
    }
    GRADMIX_UNROLL
    for (int i = 0; i < Rows; ++i) sums[row + i] = sum[i];
  }
  if constexpr (Rows > 1) {
    if (row < rows) look_up<T, Rows / 2>(tables, places, groups, rows, begins, sums, row);
  }
}

// Where the positions of one register lie, and which of its lanes are its own: the last register of a sample's plane is
// moved back so that it ends where the plane does, and leaves the lanes that it shares to the one before.
struct Lanes {
  std::int64_t sample;
  std::int64_t position;
  int first;
  int end;
};

template <typename T>
Lanes lanes_of(const Piece& p, std::int64_t index) {
  constexpr int lanes = Simd<T>::lanes;
  constexpr std::int64_t per_unit = kUnit / lanes;
  if (!p.planes) {
    const std::int64_t first = index * lanes;  // over all samples
    const std::int64_t left = p.samples * p.positions - first;
    return {first / p.positions, first % p.positions, 0, static_cast<int>(left < lanes ? (left < 0 ? 0 : left) : lanes)};
  }
  const std::int64_t registers = (p.positions + kUnit - 1) / kUnit * per_unit;  // of a sample
  const std::int64_t sample = index / registers;
  const std::int64_t position = index % registers * lanes;
  const std::int64_t left = p.positions - position;
  if (left >= lanes) return {sample, position, 0, lanes};
  if (left <= 0) return {sample, 0, 0, 0};
  if (p.positions < lanes) return {sample, 0, 0, static_cast<int>(left)};
  return {sample, p.positions - lanes, lanes - static_cast<int>(left), lanes};
}

// The next position over all samples.
inline void advance(const Piece& p, std::int64_t& sample, std::int64_t& position) {
  if (++position == p.positions) {
    position = 0;
    ++sample;
  }
}

// Columns [first, first + count) of the positions of one register into columns[0 .. count), and zeros up to a whole group.
template <typename In, typename T>
inline void load_columns(const Piece& p, const Lanes& at, std::int64_t first, int count, Vector<T>* columns) {
  constexpr int lanes = Simd<T>::lanes;
  const In* const x = static_cast<const In*>(p.x);
  const int given = static_cast<int>(p.columns - first < count ? p.columns - first : count);  // the rest are ones
  if (p.planes && p.positions >= lanes) {
    const In* const from = x + at.sample * p.sample_stride + at.position + first * p.column_stride;
    for (int c = 0; c < given; ++c) columns[c] = load(from + c * p.column_stride);
#if defined(__GNUC__)
    if (at.position + 3 * lanes <= p.positions) {
      // The columns lie too far apart for the processor to foresee what is read next. Into the second cache: in the first,
      // columns whose distance is a power of two would drive each other out.
      for (int c = 0; c < given; ++c) __builtin_prefetch(from + c * p.column_stride + 2 * lanes, 0, 2);
    }
#endif
  } else if (p.planes) {
    const In* const from = x + at.sample * p.sample_stride + first * p.column_stride;
    for (int c = 0; c < given; ++c) {
      T part[lanes] = {};
      for (int lane = 0; lane < at.end; ++lane) part[lane] = value(from + c * p.column_stride + lane);
      columns[c] = *reinterpret_cast<const Unaligned<T>*>(part);
    }
  } else {
    const In* from[lanes];
    std::int64_t sample = at.sample, position = at.position;
    for (int lane = 0; lane < lanes; ++lane) {
      from[lane] = x + sample * p.sample_stride + position * p.position_stride + first;
      if (lane + 1 < at.end) advance(p, sample, position);  // lanes beyond the end repeat the last position
#if defined(__GNUC__)
      if (p.columns >= kWideRow) {
        // What the next register reads, mostly: of each row only a part is read at a time, which is not foreseen either.
        const char* const next = reinterpret_cast<const char*>(from[lane] + lanes * p.position_stride);
        for (std::int64_t byte = 0; byte < given * static_cast<std::int64_t>(sizeof(In)); byte += 64) {
          __builtin_prefetch(next + byte);
        }
      }
#endif
    }
    int c = 0;
    for (; c + lanes <= given; c += lanes) {
      Vector<T> square[lanes];
      GRADMIX_UNROLL
      for (int lane = 0; lane < lanes; ++lane) square[lane] = load(from[lane] + c);
      transpose<T>(square);
      GRADMIX_UNROLL
      for (int i = 0; i < lanes; ++i) columns[c + i] = square[i];
    }
    for (; c < given; ++c) {
      T part[lanes];
      for (int lane = 0; lane < lanes; ++lane) part[lane] = value(from[lane] + c);
      columns[c] = *reinterpret_cast<const Unaligned<T>*>(part);
    }
  }
  for (int c = given; c < count; ++c) columns[c] = Vector<T>{} + T(1);
  for (int c = count; c % 4 != 0; ++c) columns[c] = Vector<T>{};
}

// The sums of one register's positions into rows [first, first + rows) of the matrix's product, position by position.
template <typename T>
inline void write(const Piece& p, const Lanes& at, const Vector<T>* sums, std::int64_t first, std::int64_t rows) {
  constexpr int lanes = Simd<T>::lanes;
  T* const out = static_cast<T*>(p.out) + (at.sample * p.positions + at.position) * p.rank + first;
  const T scale = static_cast<T>(p.scale);
  for (std::int64_t i = 0; i < rows; i += lanes) {
    const std::int64_t width = rows - i < lanes ? rows - i : lanes;
    Vector<T> square[lanes];
    GRADMIX_UNROLL
    for (int k = 0; k < lanes; ++k) square[k] = k < width ? sums[i + k] * scale : Vector<T>{};
    transpose<T>(square);
    for (int lane = at.first; lane < at.end; ++lane) {
      T* const to = out + lane * p.rank + i;
      if (width == lanes) {
        *reinterpret_cast<Unaligned<T>*>(to) = square[lane];
      } else {
        T part[lanes];
        *reinterpret_cast<Unaligned<T>*>(part) = square[lane];
        for (std::int64_t k = 0; k < width; ++k) to[k] = part[k];
      }
    }
  }
}

template <typename In, typename T>
void project(const Piece& p) {
  constexpr std::int64_t per_unit = kUnit / Simd<T>::lanes;
  auto* const sums = static_cast<Vector<T>*>(p.sums);
  const std::int64_t columns = p.columns + (p.ones ? 1 : 0);
  const std::int64_t begin = p.begin * per_unit, end = p.end * per_unit;
  Vector<T> tables[kGroups * kSums];
  Vector<T> block[kColumns];
  Places places;
  for (std::int64_t first = 0; first < p.rank; first += kRankBlock) {
    const std::int64_t rows = p.rank - first < kRankBlock ? p.rank - first : kRankBlock;
    for (std::int64_t column = 0; column == 0 || column < columns; column += kColumns) {  // once without any: sums of 0
      const int count = static_cast<int>(columns - column < kColumns ? columns - column : kColumns);
      const int groups = (count + 3) / 4;
      find_places(p, column / 4, first, rows, places);
      for (std::int64_t index = begin; index < end; ++index) {
        const Lanes at = lanes_of<T>(p, index);
        if (at.first == at.end) continue;
        load_columns<In, T>(p, at, column, count, block);
        for (int g = 0; g < groups; ++g) {
          fill_table<T>(block[4 * g], block[4 * g + 1], block[4 * g + 2], block[4 * g + 3], tables + g * kSums);
        }
        look_up<T, kRows>(tables, places, groups, rows, column == 0, sums + (index - begin) * rows);
      }
    }
    for (std::int64_t index = begin; index < end; ++index) {
      const Lanes at = lanes_of<T>(p, index);
      if (at.first != at.end) write<T>(p, at, sums + (index - begin) * rows, first, rows);
    }
  }
}

}  // namespace

const Table& GRADMIX_LEVEL() {
  static const Table table{project<float, float>, project<double, double>, project<Bfloat16, float>,
                           project<Float16, float>};
  return table;
}

}  // namespace gradmix::sketch_project_kernel
