// `train_gpt polar`: what the polynomials of Newton-Schulz make of singular values, as tables and as columns
// for a plot. The mathematics is optim/polar_band.h.
//
//   without --ns   every set of the table: steps, slope at 0, work, band of [least, 1] after the last step
//   --ns           one set or the user's coefficients: the band after each number of steps
//   --within E     the fewest steps of each set whose band lies in [1 - E, 1 + E], or why there are none
//   --plot FILE    columns "x value value ...": of each set, or with --ns after each number of steps
//
// x is a singular value of X / ||X||_F; for aol4, of X after its scaling, up to its safety. Work is in units
// of n^2 m FLOPs for a square matrix, n = m: 6 a quintic step, 4 a cubic one.
#pragma once

#include "options.h"

/// Prints what `options` ask for. UsageError for a set that has no polynomial.
int run_polar(const PolarOptions& options);
