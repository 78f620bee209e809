// A loop over independent pieces of work, by OpenMP where the build has it.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace gradmix {

// Calls body(index, thread) once for every index below count, thread being below threads. The body must not throw.
template <typename Body>
void parallel_for(std::int64_t count, int threads, const Body& body) {
#if defined(_OPENMP)
  // A region of one thread is not opened at all: a forked process may then run it although its parent had a pool.
  if (threads > 1 && count > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic)
      for (std::int64_t index = 0; index < count; ++index) body(index, thread);
    }
    return;
  }
#else
  (void)threads;
#endif
  for (std::int64_t index = 0; index < count; ++index) body(index, 0);
}

}  // namespace gradmix
