// What a schedule of odd polynomials makes of singular values, exactly: the image of an interval. Every step
// is continuous, so it takes an interval to an interval, whose ends lie at the ends and at the critical
// points of p(x) = a x + b x^3 + c x^5, the roots of a quadratic in x^2.
//
//   band of [low, high] after steps p_1, ..., p_k:   p_k(... p_1([low, high]))
//
// A polar factor by Newton-Schulz has all its singular values in the band of [least, 1] / safety, when those
// of X / ||X||_F are at least `least`.
#pragma once

#include <span>

#include "optim/polar_method.h"

struct Band {
  double low, high;
};

/// The largest singular value that a method may leave. The first steps of the optimal schedules reach 1.99.
inline constexpr double kLargestPolar = 2;

/// The image of `from` after all steps; NaN when the steps overflow.
Band polar_band(std::span<const Quintic> steps, Band from);

/// The band of a Newton-Schulz method over singular values of X / ||X||_F in [least, 1].
Band polar_band(const PolarMethod& method, double least);

/// Polynomials that can go on: the last step repeats.
struct PolarSchedule {
  std::span<const Quintic> steps;
  double safety = 1;
};
/// The fewest steps whose band over [least, 1] lies within [1 - within, 1 + within]; 0 when `most` do not
/// reach it.
int steps_within(const PolarSchedule& schedule, double least, double within, int most = 100);
