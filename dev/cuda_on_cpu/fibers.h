// Fibers: stacks that one OS thread runs in turn. Each CUDA thread of a block is one.
//
// A switch is twelve instructions of x86-64 (about 5 ns), or swapcontext elsewhere (300 ns, a system call).
// The address and thread sanitizers are told of every switch.
#pragma once

#include <cstddef>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define CUDA_ON_CPU_ASAN 1
#else
#define CUDA_ON_CPU_ASAN 0
#endif
#if defined(__SANITIZE_THREAD__)
#define CUDA_ON_CPU_TSAN 1
#else
#define CUDA_ON_CPU_TSAN 0
#endif

namespace cuda_on_cpu {

inline constexpr bool kAsan = CUDA_ON_CPU_ASAN, kTsan = CUDA_ON_CPU_TSAN;

/// Bytes of one CUDA thread's stack, its guard page included. Sanitizers make frames larger.
inline constexpr size_t kStackBytes = (kAsan || kTsan ? 576 : 192) << 10;

struct Fiber {
  void* stack = nullptr;  // lowest address
  size_t stack_bytes = 0;
  void* suspended_at = nullptr;  // where to go on; null while it runs and before it is prepared
  void* asan_stack = nullptr;    // AddressSanitizer's record of it
  void* tsan_fiber = nullptr;    // ThreadSanitizer's

  /// Makes the fiber known to ThreadSanitizer. The caller's past is ordered before all that the fiber does,
  /// so this must not be left to another CUDA thread.
  void announce();
  /// Makes the fiber begin with entry(), on a stack of kStackBytes, when it is next switched to.
  void prepare(void* stack, void (*entry)());
  /// Describes the stack that the caller runs on, an OS thread's own, so that fibers can return to it.
  void adopt_os_thread();
};

/// Suspends `from`, the caller, and runs `to`. Returns when somebody switches to `from`.
void switch_fiber(Fiber& from, Fiber& to);
/// Runs `to` and never returns: the caller's stack may be used again at once.
[[noreturn]] void leave_fiber(Fiber& to);
/// The first thing that a fiber's entry() calls.
void enter_fiber();

/// Stacks to be used again; one pool per OS thread.
class StackPool {
 public:
  void* take();
  void give(void* stack) { free_.push_back(stack); }

 private:
  std::vector<void*> free_;
};

/// True when the address lies in the guard page below a fiber's stack. For crash reports.
bool is_stack_guard(const Fiber& fiber, const void* address);

// --------------------------------------------------------------------------- what the race detector is told
// The executor's bookkeeping is no memory traffic of the kernel, and its barriers order the kernel's
// accesses.

#if CUDA_ON_CPU_TSAN
void ignore_accesses(bool on);
void happens_before(void* token);  // what the caller did is ordered before ...
void happens_after(void* token);   // ... what the caller of this does next
#else
inline void ignore_accesses(bool) {}
inline void happens_before(void*) {}
inline void happens_after(void*) {}
#endif

/// The race detector does not look while one of these lives. They nest, and belong to the fiber.
struct Unobserved {
  Unobserved() { ignore_accesses(true); }
  ~Unobserved() { ignore_accesses(false); }
  Unobserved(const Unobserved&) = delete;
  Unobserved& operator=(const Unobserved&) = delete;
};

}  // namespace cuda_on_cpu
