// Norms under test on either device, and the checks that both devices share.
#pragma once

#include <gtest/gtest.h>

#include <cmath>

#include "optim/modular.h"
#include "optim/norm.h"
#include "tests/optim_golden.h"

/// Every norm of matrices, and both families of Proposition 8 over their range.
std::vector<Norm> matrix_norms();

template <typename T>
MatrixOf<T> dualized(Context& ctx, const Norm& kind, const MatrixOf<T>& g, bool transposed = false) {
  const ThereOf<T> from(ctx, g), to(ctx, g);
  dualize(ctx, {.out = to.tensor(), .g = from.tensor(), .norm = kind, .transposed = transposed});
  return to.here();
}
template <typename T>
double norm_of(Context& ctx, const Norm& kind, const MatrixOf<T>& w, bool transposed = false) {
  return norm(ctx, kind, ThereOf<T>(ctx, w).tensor(), transposed);
}
template <typename T>
double dual_of(Context& ctx, const Norm& kind, const MatrixOf<T>& g, bool transposed = false) {
  return dual_norm(ctx, kind, ThereOf<T>(ctx, g).tensor(), transposed);
}

/// norm_examples of the golden file, stored both ways round.
template <typename T>
void check_expected_norms(UseDevice use);

/// Proposition 7's example: an embedding and a linear layer under one sharpness.
template <typename T>
void check_modular_numbers(UseDevice use, double tolerance);
