#include "dev/cuda_on_cpu/fibers.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

#include "dev/cuda_on_cpu/block.h"

#if CUDA_ON_CPU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if CUDA_ON_CPU_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#define NO_TSAN __attribute__((no_sanitize("thread")))
#else
#define NO_TSAN
#endif

namespace cuda_on_cpu {
namespace {
constexpr size_t kGuardBytes = 64 << 10;  // more than the frame of a function

// ---------------------------------------------------------------------------------------- the switch itself
#if defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
// Saves what a callee must keep, exchanges the stack pointers, restores. Signal masks and floating-point
// control words stay as they are: all fibers of an OS thread share them.
extern "C" void cuda_on_cpu_switch(void** save, void* to);
asm(R"(
.text
.p2align 4
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, . - cuda_on_cpu_switch
)");

NO_TSAN void raw_switch(void** save, void* to) {
  cuda_on_cpu_switch(save, to);
}

/// A stack that looks as if entry() had been about to begin when it was suspended: six registers, its
/// address, and a null return address where a call would have put one.
void* fresh_stack(void* stack, size_t bytes, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(static_cast<char*>(stack) + bytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}
#else
}  // namespace
}  // namespace cuda_on_cpu
#include <ucontext.h>
namespace cuda_on_cpu {
namespace {
// A suspended fiber is a ucontext_t on the heap, freed by whoever has left it.
thread_local ucontext_t* left = nullptr;

NO_TSAN void raw_switch(void** save, void* to) {
  auto* from = static_cast<ucontext_t*>(std::malloc(sizeof(ucontext_t)));
  *save = from;
  std::free(left);
  left = static_cast<ucontext_t*>(to);
  swapcontext(from, left);
}

void* fresh_stack(void* stack, size_t bytes, void (*entry)()) {
  auto* context = static_cast<ucontext_t*>(std::malloc(sizeof(ucontext_t)));
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = bytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}
#endif

/// Everything around the switch that a sanitizer must hear of.
NO_TSAN void announced_switch(void** save, [[maybe_unused]] void** asan_save, Fiber& to) {
#if CUDA_ON_CPU_ASAN
  __sanitizer_start_switch_fiber(asan_save, to.stack, to.stack_bytes);
#endif
#if CUDA_ON_CPU_TSAN
  __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  void* at = to.suspended_at;
  to.suspended_at = nullptr;
  raw_switch(save, at);
}
}  // namespace

void Fiber::prepare(void* new_stack, void (*entry)()) {
  stack = new_stack;
  stack_bytes = kStackBytes;
  asan_stack = nullptr;
  suspended_at = fresh_stack(stack, stack_bytes, entry);
#if CUDA_ON_CPU_ASAN
  __asan_unpoison_memory_region(static_cast<char*>(stack) + kGuardBytes, stack_bytes - kGuardBytes);
#endif
}

void Fiber::announce() {
#if CUDA_ON_CPU_TSAN
  if (tsan_fiber == nullptr) tsan_fiber = __tsan_create_fiber(0);
#endif
}

void Fiber::adopt_os_thread() {
  pthread_attr_t attributes;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &stack_bytes);
  pthread_attr_destroy(&attributes);
#if CUDA_ON_CPU_TSAN
  tsan_fiber = __tsan_get_current_fiber();
#endif
}

NO_TSAN void switch_fiber(Fiber& from, Fiber& to) {
  announced_switch(&from.suspended_at, &from.asan_stack, to);
#if CUDA_ON_CPU_ASAN
  __sanitizer_finish_switch_fiber(from.asan_stack, nullptr, nullptr);
#endif
}

NO_TSAN void leave_fiber(Fiber& to) {
  static thread_local void* never_resumed;
  announced_switch(&never_resumed, nullptr, to);
  std::abort();
}

void enter_fiber() {
#if CUDA_ON_CPU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

void* StackPool::take() {
  if (!free_.empty()) {
    void* stack = free_.back();
    free_.pop_back();
    return stack;
  }
  void* stack =
      mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) fail("no memory for the stacks of CUDA threads");
  mprotect(stack, kGuardBytes, PROT_NONE);
  return stack;
}

bool is_stack_guard(const Fiber& fiber, const void* address) {
  const auto* low = static_cast<const char*>(fiber.stack);
  return address >= low && address < low + kGuardBytes;
}

#if CUDA_ON_CPU_TSAN
void ignore_accesses(bool on) {
  if (on) {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  } else {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
}
void happens_before(void* token) {
  __tsan_release(token);
}
void happens_after(void* token) {
  __tsan_acquire(token);
}
#endif

}  // namespace cuda_on_cpu
