#include "interrupt.h"

#include <condition_variable>
#include <mutex>
#include <stop_token>

namespace {
// The one mutable global of the program: a signal handler has nowhere else to put its message.
volatile std::sig_atomic_t signal_seen = 0;

void on_signal(int signal) {
  signal_seen = 1;
  std::signal(signal, SIG_DFL);
}

void sleep_until(const std::stop_token& stop) {
  std::mutex mutex;
  std::condition_variable_any never;
  std::unique_lock lock(mutex);
  never.wait(lock, stop, [] { return false; });
}
}  // namespace

InterruptGuard::InterruptGuard() : taker_(sleep_until) {
  signal_seen = 0;
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
  sigset_t taken;
  sigemptyset(&taken);
  sigaddset(&taken, SIGINT);
  sigaddset(&taken, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &taken, &before_);
}

InterruptGuard::~InterruptGuard() {
  taker_.request_stop();
  taker_.join();
  std::signal(SIGINT, SIG_DFL);
  std::signal(SIGTERM, SIG_DFL);
  pthread_sigmask(SIG_SETMASK, &before_, nullptr);
}

bool InterruptGuard::requested() const {
  return signal_seen != 0;
}
