#include "optim/update.h"

#include <cmath>
#include <limits>

#include "model/kernels/simd.h"

// Memory-bound. Each thread goes through its elements in blocks: the direction of a block stays in the L1
// cache until it has moved the weights, so that a fused update is one pass over memory and still these loops.

namespace cpu {
namespace {
constexpr int64_t kGrain = 8192;  // elements: below that, starting a thread costs more than it gives
constexpr int64_t kBlock = 1024;  // elements; divides kGrain

/// The number behind a `scale` or `guard`; 1 when there is none. NaN means: write nothing.
float read_scale(const Tensor& scale) {
  return scale ? *scale.f32() : 1.0f;
}

template <typename T>
T sign_of(T x) {
  return x > 0 ? T(1) : (x < 0 ? T(-1) : x);  // 0 and NaN stay
}

/// u = gain g for n elements, or the sign of it.
template <bool kSign, typename T>
void scaled_block(T* u, const T* g, T gain, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) u[i] = kSign ? sign_of(gain * g[i]) : gain * g[i];
}

/// The numbers of an entry, g's scale included.
template <typename T>
struct Mixture {
  T beta, gain;  // of the new m
  T look, aim;   // of u, from the old m; unused where u is the new m
};

template <bool kLook, bool kSign, typename T>
void smooth_block(T* u, T* __restrict m, const T* g, const Mixture<T>& mix, int64_t n) {
  const T beta = mix.beta, gain = mix.gain, look = mix.look, aim = mix.aim;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T x = g[i], old = m[i];
    const T mean = beta * old + gain * x;
    const T direction = kLook ? look * old + aim * x : mean;
    m[i] = mean;
    u[i] = kSign ? sign_of(direction) : direction;
  }
}

/// What adam_block needs of an entry.
template <typename T>
struct Moments {
  T *m, *v;
  const T* g;
  T scale, beta1, beta2, eps, inverse1, inverse2;
};

/// One body for the four cases of which moments are kept; the compiler drops what a case does not need.
template <bool kFirst, bool kSecond, typename T>
void adam_block(T* u, const Moments<T>& a, int64_t begin, int64_t n) {
  T* __restrict m = kFirst ? a.m + begin : nullptr;
  T* __restrict v = kSecond ? a.v + begin : nullptr;
  const T* g = a.g + begin;
  const T beta1 = a.beta1, beta2 = a.beta2, gain1 = T(1) - beta1, gain2 = T(1) - beta2;
  const T scale = a.scale, eps = a.eps, inverse1 = a.inverse1, inverse2 = a.inverse2;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T x = scale * g[i];
    T first = x;
    T root = std::fabs(x);  // not sqrt(x * x), which underflows
    if constexpr (kFirst) m[i] = first = beta1 * m[i] + gain1 * x;
    if constexpr (kSecond) {
      const T second = beta2 * v[i] + gain2 * x * x;
      v[i] = second;
      root = std::sqrt(second * inverse2);
    }
    const T denominator = root + eps;
    u[i] = denominator == T(0) ? T(0) : first * inverse1 / denominator;
  }
}

/// What apply_block needs of an entry; without w nothing is moved.
template <typename T>
struct Target {
  T* w;
  Bf16* copy;
  T step, decay;
  bool cautious;

  explicit Target(const ApplyTo& into)
      : w(reals_of<T>(into.w)),
        copy(into.copy ? into.copy.bf16() : nullptr),
        step(static_cast<T>(into.step)),
        decay(static_cast<T>(into.decay)),
        cautious(into.cautious) {}
};

/// Moves n weights from element `begin` along u.
template <typename T>
void apply_block(const Target<T>& to, const T* __restrict u, int64_t begin, int64_t n) {
  T* __restrict w = to.w + begin;
  const T step = to.step, decay = to.decay;
  if (to.cautious && decay != 0) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) w[i] = w[i] - (u[i] * w[i] > 0 ? decay * w[i] : T(0)) - step * u[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) w[i] = w[i] - decay * w[i] - step * u[i];
  }
  if (to.copy == nullptr) return;
  Bf16* __restrict copy = to.copy + begin;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) copy[i] = to_bf16(static_cast<float>(w[i]));
}

/// Calls direction(i, n, u) for all blocks of g: elements i .. i + n - 1 of the direction go to u, which is
/// `kept` where it is kept and a buffer otherwise. Then they move the weight, if there is one.
template <typename T, typename Direction>
void for_blocks(Context& ctx, const Tensor& g, const Tensor& kept, const ApplyTo& into,
                const Direction& direction) {
  T* u = reals_of<T>(kept);
  const Target<T> target(into);
  parallel_for(ctx, g.size(), kGrain, [&](int64_t begin, int64_t end, int) {
    alignas(64) T buffer[kBlock];
    for (int64_t i = begin; i < end; i += kBlock) {
      const int64_t n = std::min(kBlock, end - i);
      T* here = u != nullptr ? u + i : buffer;
      direction(i, n, here);
      if (target.w != nullptr) apply_block(target, here, i, n);
    }
  });
}

template <typename T>
void smooth_one(Context& ctx, const Smooth& a) {
  const float scale = read_scale(a.scale);
  if (std::isnan(scale) || std::isnan(read_scale(a.into.guard))) return;
  const Look look = look_of(a);
  const Mixture<T> mix{.beta = static_cast<T>(a.beta),
                       .gain = static_cast<T>(a.gain) * scale,
                       .look = static_cast<T>(look.m),
                       .aim = static_cast<T>(look.g) * scale};
  T* m = reals_of<T>(a.m);
  const T* g = reals_of<T>(a.g);
  const auto with = [&](auto&& body) { for_blocks<T>(ctx, a.g, a.u, a.into, body); };
  if (m == nullptr && a.sign)
    with([=](int64_t i, int64_t n, T* u) { scaled_block<true>(u, g + i, mix.gain, n); });
  else if (m == nullptr)
    with([=](int64_t i, int64_t n, T* u) { scaled_block<false>(u, g + i, mix.gain, n); });
  else if (looks_ahead(a) && a.sign)
    with([=](int64_t i, int64_t n, T* u) { smooth_block<true, true>(u, m + i, g + i, mix, n); });
  else if (looks_ahead(a))
    with([=](int64_t i, int64_t n, T* u) { smooth_block<true, false>(u, m + i, g + i, mix, n); });
  else if (a.sign)
    with([=](int64_t i, int64_t n, T* u) { smooth_block<false, true>(u, m + i, g + i, mix, n); });
  else
    with([=](int64_t i, int64_t n, T* u) { smooth_block<false, false>(u, m + i, g + i, mix, n); });
}

template <typename T>
void adam_one(Context& ctx, const AdamDirection& a) {
  const float scale = read_scale(a.scale);
  if (std::isnan(scale) || std::isnan(read_scale(a.into.guard))) return;
  const Moments<T> moments{.m = reals_of<T>(a.m),
                           .v = reals_of<T>(a.v),
                           .g = reals_of<T>(a.g),
                           .scale = scale,
                           .beta1 = static_cast<T>(a.beta1),
                           .beta2 = static_cast<T>(a.beta2),
                           .eps = static_cast<T>(a.eps),
                           .inverse1 = T(1) / static_cast<T>(a.correction1),
                           .inverse2 = T(1) / static_cast<T>(a.correction2)};
  for_blocks<T>(ctx, a.g, a.u, a.into, [&](int64_t i, int64_t n, T* u) {
    if (a.m && a.v) return adam_block<true, true>(u, moments, i, n);
    if (a.m) return adam_block<true, false>(u, moments, i, n);
    if (a.v) return adam_block<false, true>(u, moments, i, n);
    adam_block<false, false>(u, moments, i, n);
  });
}

template <typename T>
void apply_one(Context& ctx, const ApplyUpdate& a) {
  if (std::isnan(read_scale(a.guard))) return;
  const Target<T> target(
      {.w = a.w, .copy = a.copy, .step = a.step, .decay = a.decay, .cautious = a.cautious});
  const T* u = reals_of<T>(a.u);
  parallel_for(ctx, a.w.size(), kGrain, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; i += kBlock) apply_block(target, u + i, i, std::min(kBlock, end - i));
  });
}
}  // namespace

void smooth(Context& ctx, std::span<const Smooth> list) {
  for (const Smooth& a : list) for_real_type(a.g.dtype, [&]<typename T>(T) { smooth_one<T>(ctx, a); });
}

void adam_direction(Context& ctx, std::span<const AdamDirection> list) {
  for (const AdamDirection& a : list) for_real_type(a.g.dtype, [&]<typename T>(T) { adam_one<T>(ctx, a); });
}

void apply_update(Context& ctx, std::span<const ApplyUpdate> list) {
  for (const ApplyUpdate& a : list) for_real_type(a.w.dtype, [&]<typename T>(T) { apply_one<T>(ctx, a); });
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
  for_real_type(args.x.dtype, [&]<typename T>(T) {
    T* x = reals_of<T>(args.x);
    for (int64_t i = 0; i < args.x.shape[0]; ++i)
      for (int64_t j = 0; j < n; ++j) x[(i * n + j) * n + j] += static_cast<T>(args.value);
  });
}
}  // namespace cpu
