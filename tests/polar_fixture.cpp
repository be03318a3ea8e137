#include "tests/polar_fixture.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

Matrix with_singular_values(Context& ctx, int64_t rows, int64_t cols, const std::vector<double>& values,
                            uint32_t seed) {
  const Matrix64 u =
      exact_polar(ctx, as<double>(random_matrix(rows, static_cast<int64_t>(values.size()), seed)));
  Matrix64 v =
      exact_polar(ctx, as<double>(random_matrix(static_cast<int64_t>(values.size()), cols, seed + 1)));
  for (int64_t i = 0; i < v.rows; ++i)
    for (int64_t j = 0; j < v.cols; ++j) v(i, j) *= values[static_cast<size_t>(i)];
  return as<float>(product(u, v));
}

std::vector<PolarMethod> iterations() {
  std::vector<PolarMethod> list;
  for (const char* name : polar_names())
    if (const PolarMethod method = polar_method(name); method.kind == PolarMethod::Kind::newton_schulz)
      list.push_back(method);
  return list;
}

template <typename T>
void check_expected_polars(UseDevice use) {
  Context ctx;
  use(ctx);
  ctx.scratch.reserve(int64_t{8} << 20);
  const double tolerance = sizeof(T) == 8 ? 1e-9 : 1e-4;
  const std::pair<const char*, const char*> rows[] = {
      {"cubic_20", "cubic"},      {"keller5", "keller5"}, {"hybrid8_2", "hybrid"},
      {"quintic12", "quintic12"}, {"modula6", "modula6"}, {"polar_express5", "polar-express"}};
  const nlohmann::json& numbers = optim_golden();
  ASSERT_EQ(numbers.at("ns_outputs").size(), std::size(rows));
  for (const auto& [name, row] : rows)
    for (const char* example : {"tall_3x2", "wide_2x3"}) {
      SCOPED_TRACE(testing::Message() << name << " " << example);
      const nlohmann::json& entry = numbers.at("ns_outputs").at(name);
      PolarMethod method = polar_method(row);
      method.eps = entry.at("opts").value("eps", 0.0);
      EXPECT_EQ(method.safety, entry.at("opts").value("norm_mult", 1.0));
      const MatrixOf<T> g(numbers.at("norm_examples").at(example).at("G"));
      EXPECT_LT(deviation(polar_of(ctx, g, method), MatrixOf<T>(entry.at(example))), tolerance);
    }
  for (const auto& [example, norms] : numbers.at("norm_examples").items())
    for (const char* exact : {"svd", "sketch", "newton"}) {
      SCOPED_TRACE(example + " " + exact);
      const MatrixOf<T> g(norms.at("G")), expected(norms.at("polar"));
      // newton is damped, and 30 steps reach small singular values only so far.
      const bool newton = std::string(exact) == "newton";
      EXPECT_LT(deviation(polar_of(ctx, g, polar_method(exact)), expected), newton && sizeof(T) == 4 ? 2e-4
                                                                            : sizeof(T) == 8         ? 1e-9
                                                                                                     : 2e-6);
    }
}

template <typename T>
void check_polars_in_float64(UseDevice use) {
  Context ctx;
  use(ctx);
  ctx.scratch.reserve(int64_t{8} << 20);
  uint32_t seed = 1;
  for (const auto& [rows, cols] : {std::pair{12, 12}, {9, 13}, {7, 29}, {16, 64}, {1, 5}, {1, 1}})
    for (PolarMethod method : iterations())
      for (const double eps : {0.0, 0.3}) {
        SCOPED_TRACE(testing::Message() << method.name << " " << rows << " x " << cols << " eps " << eps);
        method.eps = eps;
        const auto g = as<T>(random_matrix(rows, cols, seed++)), turned = g.transposed();
        EXPECT_LT(deviation(polar_of(ctx, g, method), in_float64(g, method)), rounding_of<T>(method));
        EXPECT_LT(deviation(polar_of(ctx, turned, method), in_float64(turned, method)),
                  rounding_of<T>(method));
      }
}

template <typename T>
void check_exact_methods(UseDevice use) {
  Context ctx;
  use(ctx);
  ctx.scratch.reserve(int64_t{8} << 20);
  CpuContext cpu;
  for (const auto& [rows, cols] : {std::pair{12, 12}, {9, 13}, {29, 7}, {16, 64}, {5, 1}}) {
    SCOPED_TRACE(testing::Message() << rows << " x " << cols);
    std::vector<double> values;  // within a factor of ten, so that newton's damping does not show
    for (int64_t i = 0; i < std::min(rows, cols); ++i)
      values.push_back(1 - 0.9 * static_cast<double>(i) / 12);
    const auto g = as<T>(with_singular_values(cpu, rows, cols, values, 5)), exact = exact_polar(ctx, g);
    EXPECT_LT(deviation(polar_of(ctx, g, polar_method("sketch")), exact), sizeof(T) == 8 ? 1e-10 : 5e-5);
    EXPECT_LT(deviation(polar_of(ctx, g, polar_method("newton")), exact), sizeof(T) == 8 ? 1e-9 : 5e-3);
    EXPECT_LT(deviation(polar_of(ctx, scaled(g, 1e-20), polar_method("newton")),
                        polar_of(ctx, g, polar_method("newton"))),
              2e-5);
  }
}

void check_polars_of_zero_and_nan(UseDevice use) {
  Context ctx;
  use(ctx);
  ctx.scratch.reserve(int64_t{8} << 20);
  for (const char* name : polar_names()) {
    const PolarMethod method = polar_method(name);
    for (const int64_t cols : {6, 20}) {
      SCOPED_TRACE(testing::Message() << name << " " << cols);
      const DType dtype = method.bears_bf16() ? ctx.dtype : DType::f32;
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

template void check_expected_polars<float>(UseDevice);
template void check_expected_polars<double>(UseDevice);
template void check_polars_in_float64<float>(UseDevice);
template void check_polars_in_float64<double>(UseDevice);
template void check_exact_methods<float>(UseDevice);
template void check_exact_methods<double>(UseDevice);
