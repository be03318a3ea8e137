#include "model/kernels/gelu.h"

#include "model/kernels/fast_math.h"
#include "model/kernels/packs.cuh"

// Memory-bound: every thread moves 16 bytes of each tensor. Arithmetic is float32 whatever the storage.

namespace {
constexpr int kBlock = 256;
constexpr float kRoot2OverPi = 0.79788456f, kCubic = 0.044715f, kLog2E = 1.44269504f;

// s = (1 + tanh u) / 2 = 1 / (1 + e) with e = exp(-2 u), which keeps its relative accuracy in the left tail.
// From the GPU's own exponential and division: the relative error is below 1e-6 where -2 u < 4, and the
// absolute error below 1e-7 everywhere. tanhf is more than twice the instructions, too many to hide behind
// the memory traffic.
__device__ __forceinline__ float exp_of_minus_2u(float x, float square) {
  constexpr float kScale = -2 * kLog2E * kRoot2OverPi;
  return fast_exp2(x * (kScale + kScale * kCubic * square));
}

__device__ __forceinline__ float gelu(float x) {
  return x * __fdividef(1.0f, 1.0f + exp_of_minus_2u(x, x * x));
}

__device__ __forceinline__ float gelu_slope(float x) {
  const float square = x * x, e = exp_of_minus_2u(x, square);
  const float s = __fdividef(1.0f, 1.0f + e);
  // 1 - s. As a difference it has no digits where s is close to 1, and x u' is ten there. inf 0, where s is
  // 0, becomes 1.
  const float rest = fminf(e * s, 1.0f);
  const float du = kRoot2OverPi * (1.0f + 3.0f * kCubic * square);
  return s + 2.0f * x * (s * rest) * du;  // 1 - tanh^2 u = 4 s (1 - s)
}

template <typename T, int N>
__global__ void __launch_bounds__(kBlock) gelu_forward_kernel(T* y, const T* x, int64_t packs) {
  const int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  if (i >= packs) return;
  Floats<N> values = load_floats<N, Caching::stream>(x + i * N);
#pragma unroll
  for (float& value : values.v) value = gelu(value);
  store_floats<N>(y + i * N, values);  // read again by the next product: may stay in the cache
}

template <typename T, int N>
__global__ void __launch_bounds__(kBlock)
    gelu_backward_kernel(T* dx, const T* dy, const T* x, int64_t packs) {
  const int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  if (i >= packs) return;
  const Floats<N> input = load_floats<N, Caching::stream>(x + i * N);
  Floats<N> values = load_floats<N>(dy + i * N);
#pragma unroll
  for (int k = 0; k < N; ++k) values.v[k] *= gelu_slope(input.v[k]);
  store_floats<N>(dx + i * N, values);
}
}  // namespace

void gpu::gelu_forward(Context& ctx, const GeluForward& args) {
  for_float_type(args.x.dtype, [&]<typename T>(T) {
    T* y = data_of<T>(args.y);
    const T* x = data_of<T>(args.x);
    const int64_t n = args.x.size();
    by_width<T>(can_vectorize<T>(n, x, y), [&](auto N) {
      launch(ctx, {.grid = blocks_for(n / N, kBlock), .block = kBlock}, gelu_forward_kernel<T, N()>, y, x,
             n / N);
    });
  });
}

void gpu::gelu_backward(Context& ctx, const GeluBackward& args) {
  for_float_type(args.x.dtype, [&]<typename T>(T) {
    T* dx = data_of<T>(args.dx);
    const T *dy = data_of<T>(args.dy), *x = data_of<T>(args.x);
    const int64_t n = args.x.size();
    by_width<T>(can_vectorize<T>(n, x, dx, dy), [&](auto N) {
      launch(ctx, {.grid = blocks_for(n / N, kBlock), .block = kBlock}, gelu_backward_kernel<T, N()>, dx, dy,
             x, n / N);
    });
  });
}
