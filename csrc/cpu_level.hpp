// Which of the kernels compiled per instruction set serves on this machine.
#pragma once

namespace gradmix {

enum class CpuLevel { kBase, kAvx2, kAvx512 };

// The newest instruction set of this machine, or an older one that the environment variable GRADMIX_CPU_LEVEL names (to
// test and to compare). It is settled by the first call.
CpuLevel cpu_level();

// "base", "avx2" or "avx512".
const char* cpu_level_name();

// The table of kernels of that level; the newer two are not linked where the build has only the base.
#if defined(GRADMIX_X86_LEVELS)
#define GRADMIX_KERNELS(space)                                             \
  (::gradmix::cpu_level() == ::gradmix::CpuLevel::kAvx512 ? space::avx512() \
   : ::gradmix::cpu_level() == ::gradmix::CpuLevel::kAvx2 ? space::avx2()   \
                                                           : space::base())
#else
#define GRADMIX_KERNELS(space) (space::base())
#endif

}  // namespace gradmix
