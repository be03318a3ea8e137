#include "optim/power.h"

#include <cmath>
#include <limits>

namespace {
template <typename T>
void raise(T* y, const T* x, double exponent, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const double value = x[i];
    const double other = value == 0 ? 0 : std::numeric_limits<double>::quiet_NaN();
    y[i] = static_cast<T>(value > 0 ? std::pow(value, exponent) : other);
  }
}
}  // namespace

void cpu::power(Context&, const Power& args) {
  if (args.x.dtype == DType::f64)
    raise(args.y.f64(), args.x.f64(), args.exponent, args.x.size());
  else
    raise(args.y.f32(), args.x.f32(), args.exponent, args.x.size());
}
