// Polar factors: the polynomials as scalars, matrices against expected numbers and against the exact factor.
#include <gtest/gtest.h>

#include <cmath>

#include "optim/norm.h"
#include "optim/svd.h"
#include "tests/polar_fixture.h"

namespace {
using nlohmann::json;

/// The polynomial of a method on one singular value, in float64.
/// A singular value x of X / ||X||_F after the method.
double on_scalar(const PolarMethod& method, double x) {
  return method.apply(x / method.safety);
}

}  // namespace

TEST(PolarTable, ScalarsAsExpected) {
  const json& numbers = optim_golden().at("ns_scalar");
  const struct {
    const char* name;
    PolarMethod method;
  } rows[] = {{"keller5", polar_method("keller5")},
              {"hybrid8_2", polar_method("hybrid")},
              {"modula6", polar_method("modula6")},
              {"quintic_2_-1.5_0.5_x12", polar_method("quintic12")},
              {"cubic_x5", polar_method("cubic", 5)},
              {"cubic_x30", polar_method("cubic", 30)},
              {"polar_express5_of_x_over_1.02", polar_method("polar-express")}};
  for (const auto& row : rows)
    for (size_t i = 0; i < numbers.at("x").size(); ++i)
      EXPECT_NEAR(on_scalar(row.method, numbers.at("x").at(i)), numbers.at(row.name).at(i), 1e-9) << row.name;
}

TEST(PolarTable, BandsAsExpected) {
  const std::pair<const char*, const char*> rows[] = {{"keller5", "keller5"},
                                                      {"hybrid8_2", "hybrid"},
                                                      {"polar_express5", "polar-express"},
                                                      {"modula6", "modula6"},
                                                      {"quintic12", "quintic12"}};
  for (const auto& [name, method] : rows)
    for (const auto& [from, band] : optim_golden().at("ns_bands").at(name).items()) {
      const double low = std::stod(from.substr(3));
      double least = 10, most = 0;
      for (int i = 0; i <= 100000; ++i) {
        const double y = on_scalar(polar_method(method), low * std::pow(1 / low, i / 100000.0));
        least = std::min(least, y);
        most = std::max(most, y);
      }
      EXPECT_NEAR(least, band.at(0), 1e-3) << name << " " << from;
      EXPECT_NEAR(most, band.at(1), 1e-3) << name << " " << from;
    }
}

TEST(PolarTable, CubicRegions) {  // (0, sqrt 3) -> 1; (sqrt 3, 2] -> -1, silently; beyond sqrt 5 it diverges
  const json& numbers = optim_golden().at("cubic_region");
  for (size_t i = 0; i < numbers.at("sigma0").size(); ++i) {
    const double sigma = numbers.at("sigma0").at(i);
    double x = sigma;
    for (int k = 0; k < 60 && std::fabs(x) < 1e6; ++k) x = on_scalar(polar_method("cubic", 1), x);
    const json& expected = numbers.at("after_60").at(i);
    const bool unstable =
        std::fabs(sigma - std::sqrt(3.0)) < 1e-6 || std::fabs(sigma - std::sqrt(5.0)) < 1e-6;
    if (expected.is_string()) {
      EXPECT_GT(std::fabs(x), 1e6) << sigma;
    } else if (!unstable) {
      EXPECT_NEAR(x, expected.get<double>(), 1e-6) << sigma;
    }
  }
  EXPECT_NEAR(on_scalar(polar_method("cubic", 10), 1e-9) / 1e-9, std::pow(1.5, 10), 1e-6);
}

TEST(Polar, ExpectedMatrices) {
  check_expected_polars(on_cpu);
}

TEST(Polar, SameAsFloat64) {
  check_polars_in_float64(on_cpu);
}

// Singular values over five decades, as gradients have: the small ones must come out as the polynomial says.
TEST(Polar, WideSpectrum) {
  CpuContext ctx;
  std::vector<double> values;
  for (int i = 0; i < 24; ++i) values.push_back(std::pow(10.0, -5.0 * i / 23));
  for (const auto& [rows, cols] : {std::pair{24, 24}, {24, 96}})
    for (const PolarMethod& method : iterations()) {
      SCOPED_TRACE(testing::Message() << method.name << " " << rows << " x " << cols);
      const Matrix g = with_singular_values(ctx, rows, cols, values, 7);
      const Matrix expected = in_float64(g, method), got = polar_of(ctx, g, method);
      Matrix difference = got;
      for (size_t i = 0; i < got.data.size(); ++i) difference.data[i] -= expected.data[i];
      EXPECT_LT(norm(ctx, {NormKind::l2_l2}, difference.tensor()), 2e-3);
    }
}

TEST(Polar, RankDeficientStaysSmall) {  // directions that are zero stay zero, also through rounding
  CpuContext ctx;
  for (const auto& [rows, cols] : {std::pair{20, 20}, {20, 80}}) {
    const Matrix g = with_singular_values(ctx, rows, cols, {1, 0.7, 0.2}, 3);
    const Matrix exact = in_float64(g, polar_method("keller5"));
    EXPECT_LT(deviation(polar_of(ctx, g, polar_method("keller5")), exact), 1e-3);
    EXPECT_LT(deviation(polar_of(ctx, g, polar_method("polar-express")),
                        in_float64(g, polar_method("polar-express"))),
              1e-3);
  }
}

TEST(Polar, TransposeScaleAndSign) {
  CpuContext ctx;
  for (const auto& [rows, cols] : {std::pair{13, 9}, {11, 47}})
    for (const PolarMethod& method : iterations()) {
      SCOPED_TRACE(method.name);
      const Matrix g = random_matrix(rows, cols, 5), o = polar_of(ctx, g, method);
      EXPECT_LT(deviation(polar_of(ctx, g.transposed(), method).transposed(), o), 2e-5);
      for (const double c : {1e-20, 1e-3, 1e6})
        EXPECT_LT(deviation(polar_of(ctx, scaled(g, c), method), o), 2e-5) << c;
      EXPECT_LT(deviation(polar_of(ctx, scaled(g, -1), method), scaled(o, -1)), 2e-5);
    }
}

TEST(Polar, ExactFactor) {
  CpuContext ctx;
  for (const auto& [rows, cols] : {std::pair{15, 6}, {6, 15}, {8, 8}}) {
    const Matrix g = random_matrix(rows, cols, 17), p = exact_polar(ctx, g);
    const Matrix gram = rows >= cols ? product(p.transposed(), p) : product(p, p.transposed());
    for (int64_t i = 0; i < gram.rows; ++i)
      for (int64_t j = 0; j < gram.cols; ++j) EXPECT_NEAR(gram(i, j), i == j, 1e-6);
    EXPECT_LT(deviation(product(p, product(p.transposed(), p)), p), 1e-6);
    std::vector<double> s(static_cast<size_t>(std::min(rows, cols)));
    Matrix copy = g;
    singular_values(ctx, copy.tensor(), s);
    double sum = 0;
    for (double value : s) sum += value;
    EXPECT_NEAR(inner(g, p) / sum, 1, 1e-6);
    const Matrix h = product(p.transposed(), g);  // G = P H, H symmetric positive semi-definite
    EXPECT_LT(deviation(h.transposed(), h), 1e-5);
    EXPECT_LT(deviation(product(p, h), g), 1e-5);
    for (uint32_t seed = 0; seed < 20; ++seed) {
      const Matrix x = random_matrix(cols, 1, seed);
      EXPECT_GE(inner(x, product(h, x)), -1e-5);
      // Proposition 4: no other semi-orthogonal matrix is closer.
      const Matrix q = exact_polar(ctx, random_matrix(rows, cols, 500 + seed));
      EXPECT_LE(inner(g, q), inner(g, p) * (1 + 1e-6));
    }
  }
}

TEST(Polar, BatchEqualsOneByOne) {
  CpuContext ctx;
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{24, 24}, {31, 17}, {16, 70}, {70, 16}})
    for (const PolarMethod& method : {polar_method("keller5"), polar_method("cubic"), polar_method("svd")}) {
      Matrix all = random_matrix(5 * rows, cols, 3), alone = all;
      const Tensor batch{all.data.data(), Shape{5, rows, cols}},
          copy{alone.data.data(), Shape{5, rows, cols}};
      polar(ctx, {.x = batch, .method = method});
      for (int64_t i = 0; i < 5; ++i) polar(ctx, {.x = copy.slice(i, 1), .method = method});
      EXPECT_EQ(all.data, alone.data) << method.name << " " << rows << " x " << cols;
    }
}

TEST(Polar, ZeroAndNaN) {
  check_polars_of_zero_and_nan(on_cpu);
}

TEST(Polar, ScratchIsWhatIsPublished) {
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{33, 33}, {33, 100}, {100, 33}, {1, 7}})
    for (const char* name : polar_names())
      for (const int steps : {0, 1, 4}) {
        if (steps > 0 && polar_method(name).steps.empty()) continue;
        const PolarMethod method = polar_method(name, steps);
        Matrix x = random_matrix(7 * rows, cols, 1);
        const Tensor batch{x.data.data(), Shape{7, rows, cols}};
        CpuContext ctx(2, 0);
        ctx.scratch.reserve(polar_scratch_bytes(ctx, batch.shape, DType::f32, method));
        EXPECT_NO_THROW(polar(ctx, {.x = batch, .method = method}));
      }
}
