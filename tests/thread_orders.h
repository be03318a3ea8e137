// Calls a body once for every order of threads that the device can be told to use: three in the executor, one
// on a GPU.
#pragma once

#include <cstdlib>
#include <string>

#ifdef CUDA_ON_CPU
#include "dev/cuda_on_cpu/order.h"
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
