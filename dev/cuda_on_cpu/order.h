// In which order the executor runs the threads of a block, and the blocks of a grid. Wrong kernels often work
// in one order; tests try several.
#pragma once

#include <string>

namespace cuda_on_cpu {
/// "forward", "reverse" or "random:SEED", for all kernels launched from now on. The environment variable
/// CUDA_ON_CPU_ORDER sets the first one.
void set_order(const std::string& order);
}  // namespace cuda_on_cpu
