#include "optim/power.h"

#include "model/kernels/cuda.h"

namespace {
constexpr int kThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads) power_kernel(T* y, const T* x, double exponent, int64_t n) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= n) return;
  const double value = x[i];
  const double other = value == 0 ? 0 : nan("");
  y[i] = static_cast<T>(value > 0 ? pow(value, exponent) : other);
}
}  // namespace

void gpu::power(Context& ctx, const Power& args) {
  const int64_t n = args.x.size();
  const Launch shape{.grid = blocks_for(n, kThreads), .block = kThreads};
  if (args.x.dtype == DType::f64)
    launch(ctx, shape, power_kernel<double>, args.y.f64(), args.x.f64(), args.exponent, n);
  else
    launch(ctx, shape, power_kernel<float>, args.y.f32(), args.x.f32(), args.exponent, n);
}
