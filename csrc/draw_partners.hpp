// The operator draw_partners on the CPU: one allowed column for each row. gradmix/ops/draw_partners.py has the rule.
#pragma once

#include <cstdint>

namespace gradmix {

struct DrawPartners {
  const std::uint8_t* allowed;  // (rows, columns), 0 or 1; null: all are
  const void* score;            // (rows, columns), float or double as `double_scores` says; null: all are alike
  bool double_scores;
  const double* drawn;          // (rows,) in [0, 1): which of the allowed columns; null: the next is given
  const std::int64_t* column;   // (rows,): the column drawn beforehand
  bool own_rows;                // the columns are the rows themselves, and no row is its own partner
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t* partner;        // (rows,), overwritten
  std::uint8_t* found;          // (rows,), overwritten
};

void draw_partners(const DrawPartners& problem);

}  // namespace gradmix
