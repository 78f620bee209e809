// The inner kernel of sketch_project, compiled once per instruction set; the one the machine has is picked when it runs.
//
// No standard header with code in it may be included here or in the kernel's source: an inline function compiled for a
// newer instruction set could be the copy that the linker keeps for everybody.
#pragma once

#include <cstdint>

namespace gradmix::sketch_project_kernel {

constexpr std::int64_t kUnit = 16;       // positions: the most that one register holds
constexpr std::int64_t kMostUnits = 16;  // of one piece
constexpr std::int64_t kRankBlock = 64;  // rows of the matrix at a time

// Some units of positions. Where the columns of a position are next to each other ("rows"), a unit is kUnit positions in a
// row, counted over all samples; where the positions of a column are ("planes"), it is kUnit positions of one sample.
struct Piece {
  const void* x;  // its entry (0, 0, 0)
  std::int64_t samples;
  std::int64_t positions;
  std::int64_t columns;
  std::int64_t sample_stride;  // all strides in elements
  std::int64_t position_stride;
  std::int64_t column_stride;
  bool planes;  // position_stride is 1; otherwise column_stride is
  bool ones;    // a column of ones is thought behind the last
  std::int64_t key;
  std::int64_t rank;
  double scale;  // of the entries +1 and -1
  std::int64_t begin;  // units
  std::int64_t end;    // at most kMostUnits more
  void* out;           // (samples, positions, rank), contiguous
  void* sums;          // scratch: kMostUnits * kUnit * kRankBlock entries of out's type, aligned to a register
};

struct Table {
  void (*float32)(const Piece&);
  void (*float64)(const Piece&);
  void (*bfloat16)(const Piece&);
  void (*float16)(const Piece&);
};

const Table& base();
const Table& avx2();
const Table& avx512();

}  // namespace gradmix::sketch_project_kernel
