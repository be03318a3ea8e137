#include "optim/update.h"

#include <cmath>
#include <limits>
#include <vector>

#include "optim/move.h"

// Memory-bound. Threads go once through the elements (move.h), range by range as they come free.

namespace cpu {
namespace {
constexpr int64_t kGrain = 8192;  // elements: below that, starting a thread costs more than it gives

template <typename T>
T sign_of(T x) {
  return x > 0 ? T(1) : (x < 0 ? T(-1) : x);  // 0 and NaN stay
}

// Directions: the element i of u, with the state of that element updated on the way.

/// gain g, or the sign of it.
template <bool kSign, typename T>
struct Scaled {
  const T* g;
  T gain;
  T operator()(int64_t i) const { return kSign ? sign_of(gain * g[i]) : gain * g[i]; }
};

/// The new m, or with kLook another mixture of the old one and g; or the sign of that. Gains carry g's scale.
template <bool kLook, bool kSign, typename T>
struct Smoothed {
  T* m;
  const T* g;
  T beta, gain;  // of the new m
  T look, aim;   // of u, from the old m
  T least;       // below it m keeps 0
  T operator()(int64_t i) const {
    const T x = g[i], old = m[i];
    const T mean = beta * old + gain * x;
    const T direction = kLook ? look * old + aim * x : mean;
    m[i] = kept_of(mean, least);
    return kSign ? sign_of(direction) : direction;
  }
};

/// One body for the four cases of which moments are kept; the compiler drops what a case does not need.
template <bool kFirst, bool kSecond, typename T>
struct Adam {
  T *m, *v;
  const T* g;
  T gain, scale, beta1, beta2, eps, inverse1, inverse2;
  T operator()(int64_t i) const {
    const T x = scale * (gain * g[i]);
    T first = x;
    T root = std::fabs(x);  // not sqrt(x * x), which underflows
    if constexpr (kFirst) {
      first = beta1 * m[i] + (T(1) - beta1) * x;
      m[i] = kept_of(first);
    }
    if constexpr (kSecond) {
      const T second = beta2 * v[i] + (T(1) - beta2) * x * x;
      v[i] = kept_of(second);
      root = std::sqrt(second * inverse2);
    }
    const T denominator = root + eps;
    return denominator == T(0) ? T(0) : first * inverse1 / denominator;
  }
};

/// The direction that an earlier operation made.
template <typename T>
struct Given {
  const T* u;
  T operator()(int64_t i) const { return u[i]; }
};

void go_through(Context& ctx, std::span<const Pass> passes) {
  std::vector<Share> shares;
  for (const Pass& pass : passes) shares.push_back({pass.n, kGrain});
  deal_out(ctx, shares, [&](int64_t i, int64_t begin, int64_t end) { passes[i].go(begin, end); });
}

/// Once through all elements of a direction, which are kept in u, move `into`, both or neither.
template <typename T, typename Direction>
Pass pass_of(const Tensor& g, const Tensor& kept, const ApplyTo& into, const Direction& direction) {
  const Mover<T> mover(kept, into);
  return {g.size(), [=](int64_t begin, int64_t end) { mover.go(begin, end, direction); }};
}

template <typename T>
Pass smooth_pass(const Smooth& a) {
  const float scale = read_scale(a.scale);
  if (std::isnan(scale) || std::isnan(read_scale(a.into.guard))) return {};
  T* const m = reals_of<T>(a.m);
  const T* const g = reals_of<T>(a.g);
  const T beta = static_cast<T>(a.beta), gain = static_cast<T>(a.gain) * scale;
  if (a.u.data == a.g.data && m == nullptr && !a.sign && !a.into.w && gain == T(1)) return {};  // u is g
  const Look mixture = look_of(a);
  const T least = a.drop_denormals ? std::numeric_limits<T>::min() : T(0);
  const T look = static_cast<T>(mixture.m), aim = static_cast<T>(mixture.g) * scale;
  const auto pass = [&](const auto& direction) { return pass_of<T>(a.g, a.u, a.into, direction); };
  if (m == nullptr && a.sign) return pass(Scaled<true, T>{g, gain});
  if (m == nullptr) return pass(Scaled<false, T>{g, gain});
  if (looks_ahead(a) && a.sign) return pass(Smoothed<true, true, T>{m, g, beta, gain, look, aim, least});
  if (looks_ahead(a)) return pass(Smoothed<true, false, T>{m, g, beta, gain, look, aim, least});
  if (a.sign) return pass(Smoothed<false, true, T>{m, g, beta, gain, look, aim, least});
  return pass(Smoothed<false, false, T>{m, g, beta, gain, look, aim, least});
}

template <bool kFirst, bool kSecond, typename T>
Pass adam_with(const AdamDirection& a, T scale) {
  return pass_of<T>(a.g, a.u, a.into,
                    Adam<kFirst, kSecond, T>{.m = reals_of<T>(a.m),
                                             .v = reals_of<T>(a.v),
                                             .g = reals_of<T>(a.g),
                                             .gain = static_cast<T>(a.gain),
                                             .scale = scale,
                                             .beta1 = static_cast<T>(a.beta1),
                                             .beta2 = static_cast<T>(a.beta2),
                                             .eps = static_cast<T>(a.eps),
                                             .inverse1 = T(1) / static_cast<T>(a.correction1),
                                             .inverse2 = T(1) / static_cast<T>(a.correction2)});
}

template <typename T>
Pass apply_pass(const ApplyUpdate& a) {
  if (std::isnan(read_scale(a.guard))) return {};
  const ApplyTo into{.w = a.w, .copy = a.copy, .step = a.step, .decay = a.decay, .cautious = a.cautious};
  return pass_of<T>(a.u, {}, into, Given<T>{reals_of<T>(a.u)});
}
}  // namespace

Pass adam_pass(const AdamDirection& a) {
  const float scale = read_scale(a.scale);
  if (std::isnan(scale) || std::isnan(read_scale(a.into.guard))) return {};
  return for_real_type(a.g.dtype, [&]<typename T>(T) {
    if (a.m && a.v) return adam_with<true, true, T>(a, scale);
    if (a.m) return adam_with<true, false, T>(a, scale);
    if (a.v) return adam_with<false, true, T>(a, scale);
    return adam_with<false, false, T>(a, scale);
  });
}

void smooth(Context& ctx, std::span<const Smooth> list) {
  std::vector<Pass> passes;
  for (const Smooth& a : list)
    passes.push_back(for_real_type(a.g.dtype, [&]<typename T>(T) { return smooth_pass<T>(a); }));
  go_through(ctx, passes);
}

void adam_direction(Context& ctx, std::span<const AdamDirection> list) {
  std::vector<Pass> passes;
  for (const AdamDirection& a : list) passes.push_back(adam_pass(a));
  go_through(ctx, passes);
}

void apply_update(Context& ctx, std::span<const ApplyUpdate> list) {
  std::vector<Pass> passes;
  for (const ApplyUpdate& a : list)
    passes.push_back(for_real_type(a.w.dtype, [&]<typename T>(T) { return apply_pass<T>(a); }));
  go_through(ctx, passes);
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
