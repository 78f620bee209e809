// What the kernels share that are compiled once per instruction set: a register as a type, and the half types' conversion.
// GRADMIX_VECTOR_BYTES is the register width of the instruction set.
//
// No standard header with code in it may be included here or in a kernel's source, and every function is static: an inline
// function compiled for a newer instruction set could be the copy that the linker keeps for everybody.
#pragma once

#include <cstdint>

#define GRADMIX_TEXT_(x) #x
#define GRADMIX_TEXT(x) GRADMIX_TEXT_(x)

namespace gradmix::kernel {

#if defined(__GNUC__)
#define GRADMIX_UNROLL _Pragma("GCC unroll 16")
template <typename T>
struct Simd {
  static constexpr int lanes = GRADMIX_VECTOR_BYTES / static_cast<int>(sizeof(T));
  typedef T Vector __attribute__((vector_size(GRADMIX_VECTOR_BYTES)));
  typedef T Unaligned __attribute__((vector_size(GRADMIX_VECTOR_BYTES), aligned(alignof(T)), may_alias));
};
#else
#define GRADMIX_UNROLL
template <typename T>
struct Simd {
  static constexpr int lanes = 1;
  using Vector = T;
  using Unaligned = T;
};
#endif

[[maybe_unused]] static inline float bits_to_float(std::uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

[[maybe_unused]] static inline std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

[[maybe_unused]] static inline void from_bfloat16(const std::uint16_t* from, float* to, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = bits_to_float(static_cast<std::uint32_t>(from[i]) << 16);
}

// Exponent and mantissa are moved into float32's places and the exponent's bias is put right by a multiplication, which
// makes subnormals right as well; only infinity and NaN need their exponent set.
[[maybe_unused]] static inline void from_float16(const std::uint16_t* from, float* to, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint32_t half = from[i];
    const std::uint32_t magnitude = float_to_bits(bits_to_float((half & 0x7fffu) << 13) * 0x1p112f);
    const std::uint32_t special = (half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    to[i] = bits_to_float(magnitude | special | (half & 0x8000u) << 16);
  }
}

}  // namespace gradmix::kernel
