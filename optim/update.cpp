#include "optim/update.h"

#include <array>
#include <cmath>

#include "model/kernels/simd.h"

namespace cpu {
namespace {
constexpr int64_t kGrain = 8192;  // elements: below that, starting a thread costs more than it gives

template <bool kNesterov>
void smooth_range(const Smooth& args, int64_t begin, int64_t end) {
  float* u = args.u.f32();
  float* __restrict m = args.m.f32();
  const float* g = args.g.f32();
  const float beta = args.beta, gain = args.gain * args.scale;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const float fresh = gain * g[i];
    const float mean = beta * m[i] + fresh;
    m[i] = mean;
    u[i] = kNesterov ? beta * mean + fresh : mean;
  }
}

/// One body for the four cases of which moments are kept; the compiler drops what a case does not need.
template <bool kFirst, bool kSecond>
void adam_range(const AdamDirection& args, int64_t begin, int64_t end) {
  float* u = args.u.f32();
  float* __restrict m = kFirst ? args.m.f32() : nullptr;
  float* __restrict v = kSecond ? args.v.f32() : nullptr;
  const float* g = args.g.f32();
  const float beta1 = args.beta1, beta2 = args.beta2, eps = args.eps, scale = args.scale;
  const float gain1 = 1.0f - beta1, gain2 = 1.0f - beta2;
  const float inverse1 = 1.0f / args.correction1, inverse2 = 1.0f / args.correction2;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const float x = scale * g[i];
    float first = x;
    float root = std::fabs(x);  // not sqrt(x * x), which underflows
    if constexpr (kFirst) m[i] = first = beta1 * m[i] + gain1 * x;
    if constexpr (kSecond) {
      const float second = beta2 * v[i] + gain2 * x * x;
      v[i] = second;
      root = std::sqrt(second * inverse2);
    }
    const float denominator = root + eps;
    u[i] = denominator == 0.0f ? 0.0f : first * inverse1 / denominator;
  }
}
}  // namespace

void smooth(Context& ctx, const Smooth& args) {
  parallel_for(ctx, args.g.size(), kGrain, [&](int64_t begin, int64_t end, int) {
    if (args.m)
      return args.nesterov ? smooth_range<true>(args, begin, end) : smooth_range<false>(args, begin, end);
    float* u = args.u.f32();
    const float* g = args.g.f32();
    const float gain = args.gain * args.scale;
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) u[i] = gain * g[i];
  });
}

void adam_direction(Context& ctx, const AdamDirection& args) {
  parallel_for(ctx, args.g.size(), kGrain, [&](int64_t begin, int64_t end, int) {
    if (args.m && args.v) return adam_range<true, true>(args, begin, end);
    if (args.m) return adam_range<true, false>(args, begin, end);
    if (args.v) return adam_range<false, true>(args, begin, end);
    adam_range<false, false>(args, begin, end);
  });
}

void sign(Context& ctx, const Sign& args) {
  float* u = args.u.f32();
  const float* x = args.x.f32();
  parallel_for(ctx, args.x.size(), kGrain, [&](int64_t begin, int64_t end, int) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i)
      u[i] = x[i] > 0 ? 1.0f : (x[i] < 0 ? -1.0f : x[i]);  // 0 and NaN stay
  });
}

void apply_update(Context& ctx, const ApplyUpdate& args) {
  float* __restrict w = args.w.f32();
  const float* __restrict u = args.u.f32();
  const float step = args.step, decay = args.decay;
  parallel_for(ctx, args.w.size(), kGrain, [&](int64_t begin, int64_t end, int) {
    if (args.cautious && decay != 0) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i)
        w[i] = w[i] - (u[i] * w[i] > 0 ? decay * w[i] : 0.0f) - step * u[i];
    } else {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) w[i] = w[i] - decay * w[i] - step * u[i];
    }
  });
}

void add_diagonal(Context&, const AddDiagonal& args) {
  const int64_t n = args.x.shape[1];
  for (int64_t i = 0; i < args.x.shape[0]; ++i)
    for (int64_t j = 0; j < n; ++j) args.x.f32()[(i * n + j) * n + j] += args.value;
}

double sum_abs(Context& ctx, const Tensor& x) {
  constexpr int64_t kChunks = 64;  // fixed, so that the sum does not depend on the number of threads
  std::array<double, kChunks> sums{};
  const float* data = x.f32();
  const int64_t n = x.size();
  const auto chunk_sum = [&](int64_t first, int64_t last, int) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      double sum = 0;
      const int64_t end = n * (chunk + 1) / kChunks;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = n * chunk / kChunks; i < end; ++i) sum += std::fabs(static_cast<double>(data[i]));
      sums[static_cast<size_t>(chunk)] = sum;
    }
  };
  if (n < kGrain)
    chunk_sum(0, kChunks, 0);
  else
    parallel_for(ctx, kChunks, 1, chunk_sum);
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}
}  // namespace cpu
