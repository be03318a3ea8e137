#include "interrupt.h"

#include <csignal>

namespace {
// The one mutable global of the program: a signal handler has nowhere else to put its message.
volatile std::sig_atomic_t signal_seen = 0;

void on_signal(int signal) {
  signal_seen = 1;
  std::signal(signal, SIG_DFL);
}
}  // namespace

InterruptGuard::InterruptGuard() {
  signal_seen = 0;
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
}

InterruptGuard::~InterruptGuard() {
  std::signal(SIGINT, SIG_DFL);
  std::signal(SIGTERM, SIG_DFL);
}

bool InterruptGuard::requested() const {
  return signal_seen != 0;
}
