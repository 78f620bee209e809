#include "cpu_level.hpp"

#include <cstdlib>
#include <string>

namespace gradmix {

CpuLevel cpu_level() {
#if defined(GRADMIX_X86_LEVELS)
  static const CpuLevel chosen = [] {
    __builtin_cpu_init();
    const char* const named = std::getenv("GRADMIX_CPU_LEVEL");
    const std::string most = named == nullptr ? "avx512" : named;
    if (most == "base") return CpuLevel::kBase;
    if (most != "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")) {
      return CpuLevel::kAvx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuLevel::kAvx2;
    return CpuLevel::kBase;
  }();
  return chosen;
#else
  return CpuLevel::kBase;
#endif
}

const char* cpu_level_name() {
  switch (cpu_level()) {
    case CpuLevel::kAvx512: return "avx512";
    case CpuLevel::kAvx2: return "avx2";
    case CpuLevel::kBase: return "base";
  }
  return "?";
}

}  // namespace gradmix
