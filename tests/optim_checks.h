// The checks of rules and optimizers that both devices share; test_optim.cpp and test_gpu_optim.cpp run them.
#pragma once

#include <span>

#include "tests/optim_fixture.h"

struct Trajectory {
  const char* name;  // in the expected numbers
  const char* rule;
  double sharpness = 0;  // > 0: steepest descent
  double tolerance = 2e-5;
};
/// Those of optim_golden.json that this program has rules for.
std::span<const Trajectory> trajectories();

/// Every trajectory in float32 and float64, of a matrix as it is and of one that is stored the other way
/// round, as embeddings are.
void check_trajectories(UseDevice use);
/// Rules that are others with other keys.
void check_equalities(UseDevice use);

void check_clipping(UseDevice use);

/// Steps that nobody reports stay without effect until the gradients are finite again.
void check_non_finite(UseDevice use);

/// Gradients of zero: nothing moves, nothing becomes NaN.
void check_zero_gradients(UseDevice use);

/// Rows, columns, matrices of rank 1, the very small and the very large: every rule finds a direction.
void check_extreme_gradients(UseDevice use);

/// Properties of optimizers.md, section 3, items 5 and 9.
void check_scion_stays_in_its_ball(UseDevice use);

void check_hyperball_keeps_the_size(UseDevice use);

/// As large as muon's update, in Frobenius norm, with lines of more equal size.
void check_normuon_evens_lines(UseDevice use);

/// A step's report can be read after the next step was enqueued, not after the one behind that.
void check_late_reports(UseDevice use);
