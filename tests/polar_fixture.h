// Polar factors under test on either device, their oracle, and the checks that both devices share.
#pragma once

#include <gtest/gtest.h>

#include <cmath>

#include "optim/polar.h"
#include "tests/optim_golden.h"

/// The polar factor of a matrix that is stored as `dtype` where ctx computes.
template <typename T>
MatrixOf<T> polar_of(Context& ctx, const MatrixOf<T>& m, const PolarMethod& method,
                     DType dtype = dtype_of<T>()) {
  const ThereOf<T> x(ctx, m, dtype);
  polar(ctx, {.x = x.batch(), .method = method});
  return x.here();
}
template <typename T>
MatrixOf<T> exact_polar(Context& ctx, const MatrixOf<T>& x) {
  return polar_of(ctx, x, polar_method("svd"));
}

/// A matrix with these singular values, in random directions.
Matrix with_singular_values(Context& ctx, int64_t rows, int64_t cols, const std::vector<double>& values,
                            uint32_t seed);

/// What Newton-Schulz starts from, in float64.
template <typename T>
Matrix64 start_of(const MatrixOf<T>& x, const PolarMethod& method) {
  Matrix64 y = scaled(as<double>(x), 1 / (std::sqrt(inner(x, x)) * method.safety + method.eps));
  if (!method.aol) return y;
  const bool tall = y.rows > y.cols;
  const Matrix64 gram = tall ? product(y.transposed(), y) : product(y, y.transposed());
  for (int64_t i = 0; i < gram.rows; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < gram.cols; ++j) sum += std::fabs(gram(i, j));
    for (int64_t j = 0; j < (tall ? y.rows : y.cols); ++j)
      (tall ? y(j, i) : y(i, j)) /= std::sqrt(sum) * method.safety;
  }
  return y;
}

/// The same iteration in float64 on plain loops, X X^T always from the left: the oracle.
template <typename T>
MatrixOf<T> in_float64(const MatrixOf<T>& x, const PolarMethod& method) {
  Matrix64 y = start_of(x, method);
  for (const Quintic& step : method.steps) {
    const Matrix64 a = product(y, y.transposed()), square = product(a, a);
    Matrix64 p(a.rows, a.cols);
    for (size_t i = 0; i < p.data.size(); ++i) p.data[i] = step.b * a.data[i] + step.c * square.data[i];
    for (int64_t i = 0; i < p.rows; ++i) p(i, i) += step.a;
    y = product(p, y);
  }
  return as<T>(y);
}

/// Every Newton-Schulz method of the table.
std::vector<PolarMethod> iterations();

/// What rounding may change. cans5 multiplies relative changes of a singular value by up to 286, near the
/// upper end of its range; 2e-6 is 16 units in the last place. All others stay within 1e-4.
template <typename T>
double rounding_of(const PolarMethod& method) {
  if (sizeof(T) == 8) return 1e-9;
  return method.name == "cans5" ? 286 * 2e-6 : 1e-4;
}

/// ns_outputs and the exact factors of the golden file, with its eps.
template <typename T>
void check_expected_polars(UseDevice use);

/// Square, tall, wide, odd, and clearly rectangular ones, which run on the Gram matrix.
template <typename T>
void check_polars_in_float64(UseDevice use);

/// The methods that are not polynomials against LAPACK's factor.
template <typename T>
void check_exact_methods(UseDevice use);

/// In batches of ctx.dtype.
void check_polars_of_zero_and_nan(UseDevice use);
