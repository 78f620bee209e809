// Random words by counter: Philox4x32-10, for C++ and CUDA alike, so that an entry of a random matrix depends on its place
// and the matrix's key alone. ops/counter_random.py is the same in torch and says which bits of which word an entry is.
//
// J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
//
// No standard header with code in it may be included here, and every function is static: sources compiled for different
// instruction sets include this, and the linker must not choose one copy for all of them.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GRADMIX_HOST_DEVICE static __host__ __device__ __forceinline__
#define GRADMIX_UNROLL_ROUNDS _Pragma("unroll")
#else
#define GRADMIX_HOST_DEVICE [[maybe_unused]] static inline
#if defined(__GNUC__)
#define GRADMIX_UNROLL_ROUNDS _Pragma("GCC unroll 10")
#else
#define GRADMIX_UNROLL_ROUNDS
#endif
#endif

namespace gradmix {

struct RandomWords {
  std::uint32_t word[4];
};

// The fourth word of the counter keeps the kinds of matrices apart.
constexpr std::uint32_t kRademacherStream = 0;
constexpr std::uint32_t kGaussianStream = 1;

// Rows that share a counter: a Rademacher entry takes one bit of a word, a Gaussian one takes 16.
constexpr int kRademacherRows = 32;
constexpr int kGaussianRows = 2;

GRADMIX_HOST_DEVICE RandomWords philox4x32(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3,
                                           std::uint32_t key0, std::uint32_t key1) {
  GRADMIX_UNROLL_ROUNDS
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c0;
    const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ key0;
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ key1;
    c1 = static_cast<std::uint32_t>(p1);
    c3 = static_cast<std::uint32_t>(p0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The words of columns 4 * block .. 4 * block + 3 for the rows of `group` (row / kRademacherRows or row / kGaussianRows).
GRADMIX_HOST_DEVICE RandomWords random_words(std::int64_t block, std::uint32_t group, std::uint32_t stream,
                                             std::int64_t key) {
  const auto b = static_cast<std::uint64_t>(block);
  const auto k = static_cast<std::uint64_t>(key);
  return philox4x32(static_cast<std::uint32_t>(b), static_cast<std::uint32_t>(b >> 32), group, stream,
                    static_cast<std::uint32_t>(k), static_cast<std::uint32_t>(k >> 32));
}

}  // namespace gradmix
