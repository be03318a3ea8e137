// Polar factors under test on either device, their oracle, and the checks that both devices share.
#pragma once

#include <gtest/gtest.h>

#include <cmath>

#include "optim/polar.h"
#include "tests/optim_golden.h"

/// The polar factor of a matrix that is stored as `dtype` where ctx computes.
inline Matrix polar_of(Context& ctx, const Matrix& m, const PolarMethod& method, DType dtype = DType::f32) {
  const There x(ctx, m, dtype);
  polar(ctx, {.x = x.batch(), .method = method});
  return x.here();
}
inline Matrix exact_polar(Context& ctx, const Matrix& x) {
  return polar_of(ctx, x, polar_method("svd"));
}

/// A matrix with these singular values, in random directions.
inline Matrix with_singular_values(Context& ctx, int64_t rows, int64_t cols,
                                   const std::vector<double>& values, uint32_t seed) {
  const Matrix u = exact_polar(ctx, random_matrix(rows, static_cast<int64_t>(values.size()), seed));
  Matrix v = exact_polar(ctx, random_matrix(static_cast<int64_t>(values.size()), cols, seed + 1));
  for (int64_t i = 0; i < v.rows; ++i)
    for (int64_t j = 0; j < v.cols; ++j) v(i, j) *= static_cast<float>(values[static_cast<size_t>(i)]);
  return product(u, v);
}

/// The same iteration in float64 on plain loops, X X^T always from the left: the oracle.
inline Matrix in_float64(const Matrix& x, const PolarMethod& method) {
  const double norm = std::sqrt(inner(x, x));
  std::vector<double> y(x.data.begin(), x.data.end());
  const auto r = static_cast<size_t>(x.rows), c = static_cast<size_t>(x.cols);
  for (double& value : y) value /= norm * method.safety;
  for (const Quintic& step : method.steps) {
    std::vector<double> a(r * r, 0), b(r * r, 0), z(r * c, 0);
    for (size_t i = 0; i < r; ++i)
      for (size_t j = 0; j < r; ++j)
        for (size_t l = 0; l < c; ++l) a[i * r + j] += y[i * c + l] * y[j * c + l];
    for (size_t i = 0; i < r; ++i)
      for (size_t l = 0; l < r; ++l)
        for (size_t j = 0; j < r; ++j) b[i * r + j] += step.c * a[i * r + l] * a[l * r + j];
    for (size_t i = 0; i < r * r; ++i) b[i] += step.b * a[i];
    for (size_t i = 0; i < r; ++i) {
      for (size_t j = 0; j < c; ++j) z[i * c + j] = step.a * y[i * c + j];
      for (size_t l = 0; l < r; ++l)
        for (size_t j = 0; j < c; ++j) z[i * c + j] += b[i * r + l] * y[l * c + j];
    }
    y = z;
  }
  Matrix out(x.rows, x.cols);
  for (size_t i = 0; i < y.size(); ++i) out.data[i] = static_cast<float>(y[i]);
  return out;
}

/// Every Newton-Schulz method of the table.
inline std::vector<PolarMethod> iterations() {
  std::vector<PolarMethod> list;
  for (const char* name : polar_names())
    if (const PolarMethod method = polar_method(name); method.kind == PolarMethod::Kind::newton_schulz)
      list.push_back(method);
  return list;
}

inline void check_expected_polars(UseDevice use) {
  Context ctx;
  use(ctx);
  ctx.scratch.reserve(int64_t{8} << 20);
  const std::pair<const char*, const char*> rows[] = {
      {"cubic_20", "cubic"},      {"keller5", "keller5"}, {"hybrid8_2", "hybrid"},
      {"quintic12", "quintic12"}, {"modula6", "modula6"}, {"polar_express5", "polar-express"}};
  const nlohmann::json& numbers = optim_golden();
  for (const auto& [name, method] : rows)
    for (const char* example : {"tall_3x2", "wide_2x3"}) {
      const Matrix g(numbers.at("norm_examples").at(example).at("G"));
      const Matrix expected(numbers.at("ns_outputs").at(name).at(example));
      EXPECT_LT(deviation(polar_of(ctx, g, polar_method(method)), expected), 1e-4) << name << " " << example;
    }
  for (const auto& [example, norms] : numbers.at("norm_examples").items())
    EXPECT_LT(deviation(exact_polar(ctx, Matrix(norms.at("G"))), Matrix(norms.at("polar"))), 1e-6) << example;
}

/// Square, tall, wide, odd, and clearly rectangular ones, which run on the Gram matrix.
inline void check_polars_in_float64(UseDevice use) {
  Context ctx;
  use(ctx);
  ctx.scratch.reserve(int64_t{8} << 20);
  uint32_t seed = 1;
  for (const auto& [rows, cols] : {std::pair{12, 12}, {9, 13}, {7, 29}, {16, 64}, {1, 5}, {1, 1}})
    for (const PolarMethod& method : iterations()) {
      SCOPED_TRACE(testing::Message() << method.name << " " << rows << " x " << cols);
      const Matrix g = random_matrix(rows, cols, seed++);
      const Matrix expected = in_float64(g, method);
      EXPECT_LT(deviation(polar_of(ctx, g, method), expected), 1e-4);
      EXPECT_LT(deviation(polar_of(ctx, g.transposed(), method).transposed(), expected), 1e-4);
    }
}

/// In batches of ctx.dtype.
inline void check_polars_of_zero_and_nan(UseDevice use) {
  Context ctx;
  use(ctx);
  ctx.scratch.reserve(int64_t{8} << 20);
  for (const char* name : polar_names()) {
    const PolarMethod method = polar_method(name);
    for (const int64_t cols : {6, 20}) {
      SCOPED_TRACE(testing::Message() << name << " " << cols);
      const DType dtype = method.on_host() ? DType::f32 : ctx.dtype;
      for (float x : polar_of(ctx, Matrix(6, cols), method, dtype).data) EXPECT_EQ(x, 0);
      Matrix bad = random_matrix(6, cols, 1);
      bad(2, 3) = std::nanf("");
      for (float x : polar_of(ctx, bad, method, dtype).data) EXPECT_TRUE(std::isnan(x));
      // A NaN stays in its own matrix.
      Matrix two = random_matrix(12, cols, 2);
      two(1, 1) = std::nanf("");
      const There both(ctx, two, dtype);
      polar(ctx, {.x = both.batch(2), .method = method});
      two = both.here();
      EXPECT_TRUE(std::isnan(two(0, 0)));
      for (int64_t j = 0; j < cols; ++j) EXPECT_FALSE(std::isnan(two(7, j)));
    }
  }
}
