#include "all_finite.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "parallel.hpp"

namespace gradmix {
namespace {

constexpr std::int64_t kEntriesOfPiece = 1 << 16;  // fewer are not worth waking threads for

// All sums of an entry's exponent bits and `one`, or-ed. By value, so that the compiler sees that nothing changes in the loop, and
// makes vectors of it.
template <typename Word>
Word carried(const char* from, std::int64_t count, Word exponent, Word one) {
  Word all = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    Word word;
    std::memcpy(&word, from + i * static_cast<std::int64_t>(sizeof word), sizeof word);
    all |= static_cast<Word>((word & exponent) + one);
  }
  return all;
}

// The exponent of a NaN or an infinity is all ones, and then, and only then, adding one to it carries into the sign's place.
template <typename Word>
bool finite(const void* values, std::int64_t count, Word exponent, int threads) {
  const Word one = exponent & (~exponent + 1), sign = exponent + one;
  std::atomic<bool> good{true};
  parallel_for((count + kEntriesOfPiece - 1) / kEntriesOfPiece, threads, [&](std::int64_t piece, int) {
    const std::int64_t begin = piece * kEntriesOfPiece;
    const char* const from = static_cast<const char*>(values) + begin * static_cast<std::int64_t>(sizeof(Word));
    if ((carried(from, std::min(count - begin, kEntriesOfPiece), exponent, one) & sign) != 0) {
      good.store(false, std::memory_order_relaxed);
    }
  });
  return good;
}

}  // namespace

bool all_finite(const void* values, std::int64_t count, Dtype dtype, int threads) {
  switch (dtype) {
    case Dtype::kFloat64:
      return finite<std::uint64_t>(values, count, 0x7ff0000000000000u, threads);
    case Dtype::kFloat32:
      return finite<std::uint32_t>(values, count, 0x7f800000u, threads);
    case Dtype::kBfloat16:
      return finite<std::uint16_t>(values, count, 0x7f80u, threads);
    default:
      return finite<std::uint16_t>(values, count, 0x7c00u, threads);
  }
}

}  // namespace gradmix
