// Runs grids: blocks over OS threads.
#pragma once

#include <type_traits>

#include "dev/cuda_on_cpu/block.h"
#include "dev/cuda_on_cpu/order.h"

namespace cuda_on_cpu {

/// Runs body once for every thread of the grid and returns when all have. `shared` is the number of bytes of
/// dynamic shared memory; `kernel` the kernel's address: with it, messages name the kernel, and its static
/// shared memory is poisoned.
void run_grid(dim3 grid, dim3 block, size_t shared, Body body, const void* kernel);

template <typename F>
void run(dim3 grid, dim3 block, size_t shared, F&& body, const void* kernel = nullptr) {
  using Callable = std::remove_reference_t<F>;
  run_grid(grid, block, shared,
           {const_cast<void*>(static_cast<const void*>(&body)),
            [](void* object) { (*static_cast<Callable*>(object))(); }},
           kernel);
}

}  // namespace cuda_on_cpu
