// Whether an array holds neither a NaN nor an infinity.
#pragma once

#include <cstdint>

#include "dtype.hpp"

namespace gradmix {

// `values` (count,) of any floating-point type.
bool all_finite(const void* values, std::int64_t count, Dtype dtype, int threads);

}  // namespace gradmix
