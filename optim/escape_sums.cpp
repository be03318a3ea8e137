#include "optim/escape_sums.h"

#include "model/kernels/sums.h"

namespace {
template <typename T>
double sum_along(const T* g, const T* w, const T* start, int64_t n) {
  double along = 0;
#pragma omp simd reduction(+ : along)
  for (int64_t i = 0; i < n; ++i) along += g[i] * (static_cast<double>(start[i]) - w[i]);
  return along;
}

template <typename T>
struct Running {
  T* s;
  T beta, gain;
};

template <typename T>
Measured sum_both(const T* g, const T* w, const T* start, const Running<T>& sum, int64_t n) {
  T* const s = sum.s;
  const T beta = sum.beta, gain = sum.gain;
  double along = 0, dual = 0;
#pragma omp simd reduction(+ : along, dual)
  for (int64_t i = 0; i < n; ++i) {
    const T now = beta * s[i] + gain * g[i];
    s[i] = now;
    dual += std::fabs(static_cast<double>(now));
    along += g[i] * (static_cast<double>(start[i]) - w[i]);
  }
  return {.dual = dual, .along = along};
}
}  // namespace

Measured cpu::escape_sums(Context& ctx, const EscapeSums& args) {
  return for_real_type(args.g.dtype, [&]<typename T>(T) {
    const T *g = reals_of<T>(args.g), *w = reals_of<T>(args.w), *start = reals_of<T>(args.start);
    T* const s = reals_of<T>(args.s);
    const T beta = static_cast<T>(args.beta), gain = static_cast<T>(args.gain);
    return sum_by_parts<Measured>(ctx, args.g.size(), [=](int64_t i, int64_t count) -> Measured {
      if (s == nullptr) return {.along = sum_along(g + i, w + i, start + i, count)};
      return sum_both<T>(g + i, w + i, start + i, {s + i, beta, gain}, count);
    });
  });
}
