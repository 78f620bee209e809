// The threads of a block as fibers of one operating-system thread. See cuda_runtime.h.
//
// GRADMIX_ORDER=backward runs threads and blocks last to first. This file is never instrumented by the thread sanitizer:
// only the kernels are, and it is told of fibers and barriers here, so that two accesses without a barrier between them are
// a race whatever the order they ran in.
#include "cuda_runtime.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>

#if defined(GRADMIX_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#elif defined(GRADMIX_ASAN)
extern "C" {
void __sanitizer_start_switch_fiber(void** saved, const void* bottom, std::size_t size);
void __sanitizer_finish_switch_fiber(void* saved, const void** bottom, std::size_t* size);
}
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace on_host {
namespace {

constexpr int kMost = 1024;
constexpr std::size_t kStack = 128 << 10;

enum State { kReady, kAtBlock, kAtWarp, kDone };

struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool started;
  State state;
  int block_barriers, warp_barriers;  // passed
  dim3 index;
  void* tsan;
  void* asan;
};

Fiber fibers[kMost];
char* stacks = nullptr;
std::uint64_t exchange[kMost];
[[maybe_unused]] ucontext_t scheduler;
[[maybe_unused]] jmp_buf scheduler_place;
[[maybe_unused]] void* scheduler_tsan = nullptr;
[[maybe_unused]] void* scheduler_asan = nullptr;
[[maybe_unused]] const void* scheduler_stack = nullptr;
[[maybe_unused]] std::size_t scheduler_stack_size = 0;
int current = -1;
int count = 0;
// What a barrier orders, for the thread sanitizer. Two of each, used in turn: the first thread past a barrier may reach the
// next one before the last has left this one, and must not hand on what it did in between.
char block_tokens[2], warp_tokens[kMost / 32][2], begin_token, end_token;
Body the_body;
const void* the_argument;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: block (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z, what);
  std::abort();
}

void acquire(void* token) {
#if defined(GRADMIX_TSAN)
  __tsan_acquire(token);
#else
  (void)token;
#endif
}

void release(void* token) {
#if defined(GRADMIX_TSAN)
  __tsan_release(token);
#else
  (void)token;
#endif
}

// Without a sanitizer the signal mask stays where it is: two system calls less for every change.
void to_scheduler() {
  Fiber& from = fibers[current];
#if defined(GRADMIX_TSAN)
  __tsan_switch_to_fiber(scheduler_tsan, 1);  // 1: a change of fibers orders nothing
  swapcontext(&from.context, &scheduler);
#elif defined(GRADMIX_ASAN)
  __sanitizer_start_switch_fiber(from.state == kDone ? nullptr : &from.asan, scheduler_stack, scheduler_stack_size);
  swapcontext(&from.context, &scheduler);
  __sanitizer_finish_switch_fiber(from.asan, nullptr, nullptr);
#else
  if (_setjmp(from.place) == 0) _longjmp(scheduler_place, 1);
#endif
}

void trampoline() {
#if defined(GRADMIX_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  acquire(&begin_token);
  the_body(the_argument);
  release(&end_token);
  fibers[current].state = kDone;
  to_scheduler();
}

__attribute__((noinline)) void to_fiber(int index) {  // its caller's loop must survive setjmp
  Fiber& to = fibers[index];
  current = index;
  threadIdx = to.index;
  const bool first = !to.started;
  to.started = true;
#if defined(GRADMIX_TSAN)
  (void)first;
  __tsan_switch_to_fiber(to.tsan, 1);
  swapcontext(&scheduler, &to.context);
#elif defined(GRADMIX_ASAN)
  (void)first;
  __sanitizer_start_switch_fiber(&scheduler_asan, stacks + index * kStack, kStack);
  swapcontext(&scheduler, &to.context);
  __sanitizer_finish_switch_fiber(scheduler_asan, nullptr, nullptr);
#else
  if (_setjmp(scheduler_place) == 0) {
    if (first) {
      setcontext(&to.context);
    } else {
      _longjmp(to.place, 1);
    }
  }
#endif
}

void prepare() {
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks + i * kStack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, trampoline, 0);
    fiber.started = false;
    fiber.state = kReady;
    fiber.block_barriers = 0;
    fiber.warp_barriers = 0;
    fiber.index = dim3(static_cast<unsigned>(i) % blockDim.x, static_cast<unsigned>(i) / blockDim.x % blockDim.y,
                       static_cast<unsigned>(i) / blockDim.x / blockDim.y);
  }
}

void run_block(bool backward) {
  prepare();
  release(&begin_token);
  while (true) {
    bool ran = false;
    for (int step = 0; step < count; ++step) {
      const int i = backward ? count - 1 - step : step;
      if (fibers[i].state != kReady) continue;
      to_fiber(i);
      ran = true;
    }
    // Nobody runs any further by himself: open the barriers that are complete.
    int at_block = 0, done = 0;
    for (int i = 0; i < count; ++i) {
      at_block += fibers[i].state == kAtBlock;
      done += fibers[i].state == kDone;
    }
    if (done == count) break;
    if (at_block == count) {
      for (int i = 0; i < count; ++i) fibers[i].state = kReady;
      continue;
    }
    for (int warp = 0; warp < count; warp += 32) {
      int waiting = 0;
      for (int i = warp; i < warp + 32; ++i) waiting += fibers[i].state == kAtWarp;
      if (waiting != 32) continue;
      for (int i = warp; i < warp + 32; ++i) fibers[i].state = kReady;
      ran = true;
    }
    if (!ran) fail("a barrier that only a part of the threads reaches");
  }
  acquire(&end_token);
}

}  // namespace

void block_barrier() {
  Fiber& own = fibers[current];
  char* const token = &block_tokens[own.block_barriers++ % 2];
  release(token);
  own.state = kAtBlock;
  to_scheduler();
  acquire(token);
}

std::uint64_t warp_exchange(std::uint64_t brought, int from) {
  const int own = current, warp = own / 32;
  const auto wait = [&] {
    char* const token = &warp_tokens[warp][fibers[own].warp_barriers++ % 2];
    release(token);
    fibers[own].state = kAtWarp;
    to_scheduler();
    acquire(token);
  };
  exchange[own] = brought;
  wait();
  const std::uint64_t got = exchange[warp * 32 + from];
  wait();
  return got;
}

void run(Body body, const void* argument, dim3 grid, dim3 block) {
  const char* const order = std::getenv("GRADMIX_ORDER");
  const bool backward = order != nullptr && std::strcmp(order, "backward") == 0;
  the_body = body;
  the_argument = argument;
  gridDim = grid;
  blockDim = block;
  count = static_cast<int>(block.x * block.y * block.z);
  if (count % 32 != 0 || count > kMost) fail("threads that are no whole warps");
  if (stacks == nullptr) stacks = static_cast<char*>(std::malloc(kMost * kStack));
#if defined(GRADMIX_TSAN)
  scheduler_tsan = __tsan_get_current_fiber();
  for (int i = 0; i < count; ++i) {
    if (fibers[i].tsan == nullptr) fibers[i].tsan = __tsan_create_fiber(0);
  }
#endif
  const std::uint64_t blocks = static_cast<std::uint64_t>(grid.x) * grid.y * grid.z;
  for (std::uint64_t step = 0; step < blocks; ++step) {
    const std::uint64_t b = backward ? blocks - 1 - step : step;
    blockIdx = dim3(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                    static_cast<unsigned>(b / grid.x / grid.y));
    run_block(backward);
  }
}

}  // namespace on_host
