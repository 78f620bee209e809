#include "draw_partners.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace gradmix {
namespace {

// Leaves of the columns that `may` allows those of the largest score; a score that is no number counts for nothing.
template <typename T>
void keep_best(const T* score, std::vector<std::uint8_t>& may) {
  T best = -std::numeric_limits<T>::infinity();
  for (std::size_t j = 0; j < may.size(); ++j) {
    if (std::isnan(score[j])) may[j] = 0;
    if (may[j] != 0) best = std::max(best, score[j]);
  }
  for (std::size_t j = 0; j < may.size(); ++j) may[j] = may[j] != 0 && score[j] == best;
}

// The column of that rank among those allowed, rank being below their number.
std::int64_t column_of_rank(const std::vector<std::uint8_t>& may, std::int64_t rank) {
  std::int64_t column = 0;
  for (rank += 1; rank > 0; ++column) rank -= may[static_cast<std::size_t>(column)];
  return column - 1;
}

}  // namespace

void draw_partners(const DrawPartners& p) {
  std::vector<std::uint8_t> may(static_cast<std::size_t>(p.columns));
  for (std::int64_t i = 0; i < p.rows; ++i) {
    const std::uint8_t* const allowed = p.allowed == nullptr ? nullptr : p.allowed + i * p.columns;
    const std::int64_t nobody = p.own_rows ? i : 0;
    if (p.drawn == nullptr) {
      const std::int64_t j = p.column[i];
      const bool there = j >= 0 && j < p.columns && !(p.own_rows && j == i);
      p.found[i] = there && (allowed == nullptr || allowed[j] != 0);
      p.partner[i] = p.found[i] != 0 ? j : nobody;
      continue;
    }
    if (allowed == nullptr) {
      std::fill(may.begin(), may.end(), std::uint8_t{1});
    } else {
      std::copy_n(allowed, p.columns, may.begin());
    }
    if (p.own_rows) may[static_cast<std::size_t>(i)] = 0;
    if (p.score != nullptr && p.double_scores) keep_best(static_cast<const double*>(p.score) + i * p.columns, may);
    if (p.score != nullptr && !p.double_scores) keep_best(static_cast<const float*>(p.score) + i * p.columns, may);
    std::int64_t count = 0;
    for (const std::uint8_t one : may) count += one;
    p.found[i] = count > 0;
    // Within [0, count) whatever was drawn. What is no number becomes 0.
    const double rank = std::floor(p.drawn[i] * static_cast<double>(count));
    const std::int64_t last = std::max<std::int64_t>(count - 1, 0);
    const std::int64_t within = rank >= static_cast<double>(last) ? last : rank > 0 ? static_cast<std::int64_t>(rank)
                                                                                    : 0;
    p.partner[i] = count > 0 ? column_of_rank(may, within) : nobody;
  }
}

}  // namespace gradmix
