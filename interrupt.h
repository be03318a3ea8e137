// Ctrl-C and SIGTERM, turned into a question that the training loop asks between steps.
#pragma once

/// While one exists, the first SIGINT or SIGTERM is remembered; the second one ends the process at once.
class InterruptGuard {
 public:
  InterruptGuard();
  ~InterruptGuard();
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;
  /// True once a signal has come.
  bool requested() const;
};
