#include "dev/cuda_on_cpu/crash.h"

#include <signal.h>

#include <cstdio>
#include <mutex>

#include "dev/cuda_on_cpu/block.h"
#include "dev/cuda_on_cpu/device_memory.h"

namespace cuda_on_cpu {
namespace {
struct sigaction previous_segv, previous_bus;

void explain(const siginfo_t& info) {
  const bool in_kernel = current_thread != nullptr;
  if (is_device_address(info.si_addr)) {
    std::fprintf(stderr, "cuda_on_cpu: %s device memory at %p\n",
                 in_kernel ? "a kernel touched inaccessible" : "host code touched", info.si_addr);
    explain_device_address(info.si_addr);
  } else if (in_kernel && is_stack_guard(current_thread->fiber, info.si_addr)) {
    std::fprintf(stderr, "cuda_on_cpu: a CUDA thread needs more than %zu bytes of stack\n", kStackBytes);
  } else if (in_kernel && info.si_code == SI_KERNEL) {
    std::fputs("cuda_on_cpu: a kernel made a misaligned vector access, or followed a wild pointer\n", stderr);
  } else if (in_kernel) {
    std::fprintf(stderr, "cuda_on_cpu: a kernel touched %p, which is not mapped\n", info.si_addr);
  }
  if (in_kernel) print_place();
}

/// Returning repeats the access, which then finds its page open, or meets the handler that was there before.
void on_crash(int, siginfo_t* info, void*) {
  if (is_device_address(info->si_addr) && open_touched(info->si_addr)) return;
  sigaction(SIGSEGV, &previous_segv, nullptr);
  sigaction(SIGBUS, &previous_bus, nullptr);
  explain(*info);
}
}  // namespace

void explain_crashes() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action = {};
    action.sa_sigaction = on_crash;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &previous_segv);
    sigaction(SIGBUS, &action, &previous_bus);
  });
}

void use_signal_stack() {
  static thread_local char memory[64 << 10];
  stack_t stack = {};
  if (sigaltstack(nullptr, &stack) != 0 || (stack.ss_flags & SS_DISABLE) == 0) return;  // there is one
  stack = {};
  stack.ss_sp = memory;
  stack.ss_size = sizeof memory;
  sigaltstack(&stack, nullptr);
}

}  // namespace cuda_on_cpu
