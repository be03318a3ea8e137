#include "optim/escape_sums.h"

#include "model/kernels/sums.h"
#include "optim/move.h"

// Memory-bound. A part of the sums (sums.h) is gone through up to three times while it is in the caches: for
// the way travelled, for the running sum, for the step.

namespace {
template <typename T>
double sum_along(const T* g, const T* w, const T* start, int64_t n) {
  return cpu::sum_of(
      n, [=](int64_t i) { return g[i] * (static_cast<double>(start[i]) - w[i]); }, g, w, start);
}

template <typename T>
struct Running {
  T* s;
  T beta, gain;
};

/// Updates s; its ||s||_1.
template <typename T>
double sum_running(const Running<T>& sum, const T* g, int64_t n) {
  T* const s = sum.s;
  const T beta = sum.beta, gain = sum.gain;
  return cpu::sum_of(
      n,
      [=](int64_t i) {
        const T now = beta * s[i] + gain * g[i];
        s[i] = now;
        return std::fabs(static_cast<double>(now));
      },
      s);
}
}  // namespace

Measured cpu::escape_sums(Context& ctx, const EscapeSums& args) {
  const Pass then = args.then != nullptr ? adam_pass(*args.then) : Pass{};
  return for_real_type(args.g.dtype, [&]<typename T>(T) {
    const T *g = reals_of<T>(args.g), *w = reals_of<T>(args.w), *start = reals_of<T>(args.start);
    T* const s = reals_of<T>(args.s);
    const T beta = static_cast<T>(args.beta), gain = static_cast<T>(args.gain);
    const bool sizes = args.sizes;
    return sum_by_parts<Measured>(ctx, args.g.size(), [=, &then](int64_t i, int64_t count) -> Measured {
      Measured part{.along = sum_along(g + i, w + i, start + i, count)};
      if (s != nullptr)
        part.dual = sum_running<T>({s + i, beta, gain}, g + i, count);
      else if (sizes)
        part.dual = cpu::sum_of_sizes(g + i, count);
      if (then.n > 0) then.go(i, i + count);
      return part;
    });
  });
}
