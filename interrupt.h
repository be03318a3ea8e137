// Ctrl-C and SIGTERM, turned into a question that the training loop asks between steps.
//
// Signals are taken in a thread that does nothing else: oneDNN's kernels point the stack register into
// buffers of the heap, and a signal that came there would write its frame over whatever lies below.
#pragma once

#include <csignal>
#include <thread>

/// While one exists, the first SIGINT or SIGTERM is remembered; the second one ends the process at once. The
/// thread that makes it, and all threads made afterwards, are left alone by both: make it before any other
/// thread.
class InterruptGuard {
 public:
  InterruptGuard();
  ~InterruptGuard();
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;
  /// True once a signal has come.
  bool requested() const;

 private:
  sigset_t before_;  // the mask of the thread that made it
  std::jthread taker_;
};
