// Runs unchanged CUDA kernels on the CPU, to test them without a GPU: README.md. Takes the place of
// cuda_runtime.h, cuda_bf16.h and cuda_fp8.h.
#pragma once

#include "dev/cuda_on_cpu/cuda_language.h"
#include "dev/cuda_on_cpu/grid.h"
#include "dev/cuda_on_cpu/queue.h"
#include "dev/cuda_on_cpu/runtime.h"
#include "dev/cuda_on_cpu/small_floats.h"
#include "dev/cuda_on_cpu/vector_types.h"
