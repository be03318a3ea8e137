#include "optim/polar_band.h"

#include <algorithm>
#include <cmath>

namespace {
/// The image of one step.
Band image(const Quintic& p, Band from) {
  const double ends[] = {p(from.low), p(from.high)};
  if (!std::isfinite(ends[0]) || !std::isfinite(ends[1])) return {NAN, NAN};
  Band to{std::min(ends[0], ends[1]), std::max(ends[0], ends[1])};
  const auto also = [&](double square) {
    if (!(square > 0)) return;
    for (const double x : {std::sqrt(square), -std::sqrt(square)})
      if (x > from.low && x < from.high) to = {std::min(to.low, p(x)), std::max(to.high, p(x))};
  };
  // p'(x) = a + 3 b t + 5 c t^2 = 0 for t = x^2, by the form of the quadratic formula that cancels nothing.
  const double root = std::sqrt(9 * p.b * p.b - 20 * p.a * p.c);  // NaN: no critical points
  const double sum = -0.5 * (3 * p.b + std::copysign(root, p.b));
  also(sum / (5 * p.c));
  also(p.a / sum);
  return to;
}
}  // namespace

Band polar_band(std::span<const Quintic> steps, Band from) {
  for (const Quintic& step : steps) from = image(step, from);
  return from;
}

Band polar_band(const PolarMethod& method, double least) {
  return polar_band(method.steps, {least / method.safety, 1 / method.safety});
}

int steps_within(const PolarSchedule& schedule, double least, double within, int most) {
  Band band{least / schedule.safety, 1 / schedule.safety};
  for (int k = 0; k < most; ++k) {
    band = image(schedule.steps[std::min(static_cast<size_t>(k), schedule.steps.size() - 1)], band);
    if (band.low >= 1 - within && band.high <= 1 + within) return k + 1;
  }
  return 0;
}
