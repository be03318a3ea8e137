#include "optim/update.h"

#include <cmath>
#include <limits>

#include "model/kernels/simd.h"

namespace cpu {
namespace {
constexpr int64_t kGrain = 8192;  // elements: below that, starting a thread costs more than it gives

/// What multiplies the gradient: a number that clip_factor left, or 1.
float scale_of(const Tensor& scale) {
  return scale ? *scale.f32() : 1.0f;
}

template <bool kNesterov>
void smooth_range(const Smooth& args, float scale, int64_t begin, int64_t end) {
  float* u = args.u.f32();
  float* __restrict m = args.m.f32();
  const float* g = args.g.f32();
  const float beta = args.beta, gain = args.gain * scale;
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
void adam_range(const AdamDirection& args, float scale, int64_t begin, int64_t end) {
  float* u = args.u.f32();
  float* __restrict m = kFirst ? args.m.f32() : nullptr;
  float* __restrict v = kSecond ? args.v.f32() : nullptr;
  const float* g = args.g.f32();
  const float beta1 = args.beta1, beta2 = args.beta2, eps = args.eps;
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

void smooth_one(Context& ctx, const Smooth& args) {
  const float scale = scale_of(args.scale);
  if (std::isnan(scale)) return;
  parallel_for(ctx, args.g.size(), kGrain, [&](int64_t begin, int64_t end, int) {
    if (args.m)
      return args.nesterov ? smooth_range<true>(args, scale, begin, end)
                           : smooth_range<false>(args, scale, begin, end);
    float* u = args.u.f32();
    const float* g = args.g.f32();
    const float gain = args.gain * scale;
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) u[i] = gain * g[i];
  });
}

void adam_one(Context& ctx, const AdamDirection& args) {
  const float scale = scale_of(args.scale);
  if (std::isnan(scale)) return;
  parallel_for(ctx, args.g.size(), kGrain, [&](int64_t begin, int64_t end, int) {
    if (args.m && args.v) return adam_range<true, true>(args, scale, begin, end);
    if (args.m) return adam_range<true, false>(args, scale, begin, end);
    if (args.v) return adam_range<false, true>(args, scale, begin, end);
    adam_range<false, false>(args, scale, begin, end);
  });
}

void sign_one(Context& ctx, const Sign& args) {
  float* u = args.u.f32();
  const float* x = args.x.f32();
  parallel_for(ctx, args.x.size(), kGrain, [&](int64_t begin, int64_t end, int) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i)
      u[i] = x[i] > 0 ? 1.0f : (x[i] < 0 ? -1.0f : x[i]);  // 0 and NaN stay
  });
}

void apply_one(Context& ctx, const ApplyUpdate& args) {
  if (std::isnan(scale_of(args.guard))) return;
  float* __restrict w = args.w.f32();
  const float* __restrict u = args.u.f32();
  Bf16* __restrict copy = args.copy ? args.copy.bf16() : nullptr;
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
    if (copy != nullptr)
      for (int64_t i = begin; i < end; ++i) copy[i] = to_bf16(w[i]);
  });
}
}  // namespace

void smooth(Context& ctx, std::span<const Smooth> list) {
  for (const Smooth& args : list) smooth_one(ctx, args);
}

void adam_direction(Context& ctx, std::span<const AdamDirection> list) {
  for (const AdamDirection& args : list) adam_one(ctx, args);
}

void sign(Context& ctx, std::span<const Sign> list) {
  for (const Sign& args : list) sign_one(ctx, args);
}

void apply_update(Context& ctx, std::span<const ApplyUpdate> list) {
  for (const ApplyUpdate& args : list) apply_one(ctx, args);
}

void clip_factor(Context&, const ClipFactor& args) {
  double sum = 0;
  for (int64_t i = 0; i < args.sums.size(); ++i) sum += args.sums.f64()[i];
  const double norm = std::sqrt(sum);
  *args.norm.f64() = norm;
  double scale = args.limit > 0 && norm > args.limit ? args.limit / norm : 1;
  if (!std::isfinite(norm)) scale = std::numeric_limits<double>::quiet_NaN();
  *args.scale.f32() = static_cast<float>(scale);
}

void add_diagonal(Context&, const AddDiagonal& args) {
  const int64_t n = args.x.shape[1];
  for (int64_t i = 0; i < args.x.shape[0]; ++i)
    for (int64_t j = 0; j < n; ++j) args.x.f32()[(i * n + j) * n + j] += args.value;
}
}  // namespace cpu
