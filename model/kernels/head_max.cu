#include "model/kernels/head_max.h"

#include "model/kernels/cuda.h"

// A head has as many rows as a batch has tokens: little enough for one block.

namespace {
constexpr int kThreads = 1024;

/// The larger one; a NaN is larger than all.
__device__ __forceinline__ float larger(float x, float y) {
  return x > y || x != x ? x : y;
}

__global__ void __launch_bounds__(kThreads) head_max_kernel(double* largest, const float* row_max, int64_t B,
                                                            int64_t NH, int64_t T, bool accumulate) {
  __shared__ float shared[kThreads / kWarpSize];
  const int64_t head = blockIdx.x;
  float most = -INFINITY;
  for (int64_t i = threadIdx.x; i < B * T; i += kThreads)
    most = larger(most, row_max[(i / T * NH + head) * T + i % T]);
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    most = larger(most, __shfl_xor_sync(kFullMask, most, offset));
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = most;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kThreads / kWarpSize; ++w) most = larger(most, shared[w]);
  // What is there was a float: nothing is rounded.
  if (accumulate) most = larger(most, static_cast<float>(largest[head]));
  largest[head] = most;
}
}  // namespace

void gpu::head_max(Context& ctx, const HeadMax& a) {
  const Shape& shape = a.row_max.shape;
  launch(ctx, {.grid = static_cast<unsigned>(shape[1]), .block = kThreads}, head_max_kernel,
         data_of<double>(a.largest), data_of<float>(a.row_max), shape[0], shape[1], shape[2], a.accumulate);
}
