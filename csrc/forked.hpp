// Whether this process is a fork of the one that loaded the extension.
#pragma once

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace gradmix {

// A fork has none of its parent's threads, but OpenMP's runtime takes the pool it knows for alive and waits for it
// forever. There, work is done by the calling thread alone; the results are the same, to the bit.
inline bool forked() {
#if defined(__unix__) || defined(__APPLE__)
  static const pid_t loaded_by = getpid();
  return getpid() != loaded_by;
#else
  return false;
#endif
}

}  // namespace gradmix
