// How the host waits for a GPU when somebody has to be asked meanwhile.
#pragma once

#include <chrono>
#include <thread>

#include "model/kernels/cuda.h"

/// Waits on the host until query() is cudaSuccess, and calls between() a few times a second; either may
/// throw.
template <typename Query, typename Between>
void wait_until(const Query& query, const Between& between) {
  using Clock = std::chrono::steady_clock;
  constexpr int kEagerLooks = 50;
  constexpr auto kPause = std::chrono::microseconds(20);
  constexpr auto kBetween = std::chrono::milliseconds(200);
  auto last = Clock::now();
  for (int looks = 0;; ++looks) {
    const cudaError_t state = query();
    if (state == cudaSuccess) return;
    if (state != cudaErrorNotReady) CUDA_CHECK(state);
    if (looks > kEagerLooks) std::this_thread::sleep_for(kPause);
    if (Clock::now() - last < kBetween) continue;
    between();
    last = Clock::now();
  }
}
