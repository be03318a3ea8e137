// Calls a body once for every order of threads, or of streams, that the device can be told to use: several in
// the executor, one on a GPU.
#pragma once

#include <cstdlib>
#include <string>

#ifdef CUDA_ON_CPU
#include "dev/cuda_on_cpu/order.h"
#include "dev/cuda_on_cpu/queue.h"
#endif

template <typename Body>
void for_each_thread_order(Body&& body) {
#ifdef CUDA_ON_CPU
  for (const char* order : {"reverse", "random:7", "forward"}) {
    cuda_on_cpu::set_order(order);
    body(std::string("threads in order ") + order);
    const char* only = std::getenv("ORDERS");
    if (only != nullptr && std::string(only) == "1") break;
  }
  cuda_on_cpu::set_order("forward");
#else
  body(std::string("on the GPU"));
  body(std::string("on the GPU, again"));
#endif
}

/// Work as soon as it is enqueued, as late as may be, and in between in many ways (dev/cuda_on_cpu/queue.h).
template <typename Body>
void for_each_stream_order(Body&& body) {
#ifdef CUDA_ON_CPU
  const std::string before = cuda_on_cpu::set_streams("eager");
  body(std::string("eager streams"));
  cuda_on_cpu::set_streams("late");
  body(std::string("late streams"));
  for (int seed = 0; seed < 20; ++seed) {
    const std::string order = "random:" + std::to_string(seed);
    cuda_on_cpu::set_streams(order);
    body(order);
  }
  cuda_on_cpu::set_streams(before);
#else
  body(std::string("streams as they are"));
#endif
}
