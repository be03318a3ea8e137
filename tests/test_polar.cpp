// Polar factors: the polynomials as scalars, matrices against expected numbers and against the exact factor.
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "error.h"
#include "optim/norm.h"
#include "optim/polar_band.h"
#include "optim/svd.h"
#include "tests/polar_fixture.h"

namespace {
using nlohmann::json;

/// A singular value x of X / ||X||_F after the method.
double on_scalar(const PolarMethod& method, double x) {
  return method.apply(x / method.safety);
}

/// U V^T of the three largest singular values.
Matrix64 exact_rank_three(Context& ctx, const Matrix& g) {
  Matrix64 x = as<double>(g);
  svd_polar(ctx, x.tensor(), {.rank = 3});
  return x;
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
  ASSERT_EQ(optim_golden().at("ns_bands").size(), std::size(rows));
  for (const auto& [name, method] : rows)
    for (const auto& [from, expected] : optim_golden().at("ns_bands").at(name).items()) {
      const Band band = polar_band(polar_method(method), std::stod(from.substr(3)));
      // Theirs is of a fine grid, so it lies inside.
      EXPECT_NEAR(band.low, expected.at(0), 2e-5) << name << " " << from;
      EXPECT_NEAR(band.high, expected.at(1), 2e-5) << name << " " << from;
      EXPECT_LE(band.low, expected.at(0).get<double>() + 1e-12) << name << " " << from;
      EXPECT_GE(band.high, expected.at(1).get<double>() - 1e-12) << name << " " << from;
    }
}

// Of the sets that the expected numbers leave out: x = 0.3 after every step, computed from the published
// coefficients elsewhere, so that no digit of the table can change by accident.
TEST(PolarTable, StepsOfTheOtherSetsAsPublished) {
  const std::pair<const char*, std::vector<double>> rows[] = {
      {"polar-express8",
       {1.8831782010, 0.8272805952, 1.8392028994, 1.2294314854, 0.9097762426, 1.0003517314, 1.0000002726,
        1.0000000000}},
      {"cans5", {1.9010215713, 1.0095284182, 1.5506383119, 0.4556139414, 0.8885478876}},
      {"you5", {1.0463984100, 0.2213334168, 0.7687837590, 1.1072479285, 0.9962242985}},
      {"aol4", {0.9118920382, 0.5837461695, 1.0509680209, 1.0088724816}},
      {"cubic5", {0.9194606016, 1.2044262393, 0.5548236119, 1.1368203352, 1.1122878202}},
      {"quintic", {0.8165160000, 1.1430809722}},
      {"cubic", {0.4365000000, 0.6131663364}}};
  for (const auto& [name, values] : rows)
    for (size_t k = 0; k < values.size(); ++k)
      EXPECT_NEAR(on_scalar(polar_method(name, static_cast<int>(k) + 1), 0.3), values[k], 1e-9)
          << name << ", " << k + 1 << " steps";
}

TEST(PolarTable, BandsAgainstAGrid) {
  for (const PolarMethod& method : iterations())
    for (const double least : {1e-4, 1e-2, 0.3}) {
      double low = 10, high = 0;
      for (int i = 0; i <= 100000; ++i) {
        const double y = on_scalar(method, least * std::pow(1 / least, i / 100000.0));
        low = std::min(low, y);
        high = std::max(high, y);
      }
      const Band band = polar_band(method, least);
      EXPECT_NEAR(band.low, low, 1e-4) << method.name << " " << least;
      EXPECT_NEAR(band.high, high, 1e-4) << method.name << " " << least;
      EXPECT_LE(band.low, low + 1e-12) << method.name << " " << least;
      EXPECT_GE(band.high, high - 1e-12) << method.name << " " << least;
    }
}

TEST(PolarTable, StepsWithinABand) {
  for (const PolarRow& row : polar_rows()) {
    if (row.steps.empty()) continue;
    const int steps = steps_within({row.steps, row.safety}, 1e-3, 0.05);
    if (steps == 0) {  // Keller's steps never settle, as those sets that end with a step of another kind
      const Band band = polar_band(polar_method(row.name, 100), 1e-3);
      EXPECT_TRUE(band.low < 0.95 || band.high > 1.05) << row.name;
      continue;
    }
    const Band band = polar_band(polar_method(row.name, steps), 1e-3);
    EXPECT_GE(band.low, 0.95) << row.name;
    EXPECT_LE(band.high, 1.05) << row.name;
    EXPECT_NE(steps, 1) << row.name;
  }
  const auto steps = [](const char* name) {
    for (const PolarRow& row : polar_rows())
      if (std::string(row.name) == name) return steps_within({row.steps, row.safety}, 1e-3, 0.05);
    return -1;
  };
  EXPECT_EQ(steps("keller5"), 0);
  EXPECT_EQ(steps("modula6"), 7);  // six end at 0.866
  EXPECT_GT(steps("cubic"), steps("quintic12"));
  EXPECT_GT(steps("quintic12"), steps("polar-express8"));
  EXPECT_GT(steps("polar-express8"), 4);
}

// Also when cut short or prolonged, no set of the table leaves [0, 2], which is what is refused.
TEST(PolarTable, EverySetIsSaneForAnyNumberOfSteps) {
  for (const PolarRow& row : polar_rows())
    for (int steps = 1; steps <= 30 && !row.steps.empty(); ++steps)
      EXPECT_NO_THROW(polar_method(row.name, steps)) << row.name << " " << steps;
}

// The first of aol4's polynomials is negative from 0.884 on, where AOL takes orthogonal rows: the wrong sign.
// Hence its division by 1.17.
TEST(PolarTable, AolNeedsItsSafety) {
  const PolarMethod aol = polar_method("aol4");
  EXPECT_LT(polar_band(aol.steps, {1e-3, 1}).low, -1);
  EXPECT_GT(polar_band(aol, 0.3).low, 0.98);
  EXPECT_LT(polar_band(aol, 0.3).high, 1.02);
}

TEST(PolarTable, CoefficientsOfTheUser) {
  const PolarMethod keller = polar_method("5x3.4445:-4.775:2.0315"), table = polar_method("keller5");
  ASSERT_EQ(keller.steps.size(), 5u);
  for (const double x : {1e-4, 0.1, 0.7, 1.0}) EXPECT_EQ(keller.apply(x), table.apply(x));
  const PolarMethod hybrid = polar_method("8x3.4445:-4.775:2.0315+2x2:-1.5:0.5");
  for (const double x : {1e-4, 0.1, 0.7, 1.0}) EXPECT_EQ(hybrid.apply(x), polar_method("hybrid").apply(x));
  EXPECT_EQ(polar_method("1.5:-0.5", 20).apply(0.3), polar_method("cubic").apply(0.3));
  EXPECT_EQ(polar_method("3.4445:-4.775:2.0315+2:-1.5:0.5", 3).steps.size(), 3u);
  EXPECT_EQ(polar_method("3.4445:-4.775:2.0315+2:-1.5:0.5", 3).steps[2].a, 2);
  EXPECT_EQ(polar_method("sketch:rank=3").rank, 3);
  EXPECT_EQ(polar_method("newton", 12).newton_steps, 12);
  const auto refused = [](const char* text, const char* part, int steps = 0) {
    try {
      polar_method(text, steps);
      ADD_FAILURE() << text << " was accepted";
    } catch (const UsageError& error) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
      EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    }
  };
  refused("kellner5", "choose coefficients");
  refused("", "no name");
  refused("x1.5:-0.5", "key=value");
  refused("svd", "takes no steps", 3);
  refused("sketch:rank=x", "rank");
  refused("keller5:rank=3", "unknown key");
  for (const char* bad : {"1.5", "1.5:", "1:2:3:4", "0x1.5:-0.5", "1.5:-0.5+", "1.5:nan", "1.5:-0.5,2",
                          "99999x1.5:-0.5", "-", "1e999:1"})
    refused(bad, "not a step");
  refused("3:-0.5", "choose coefficients that stay");      // 1 -> 2.5
  refused("5x4:-6:2.9", "choose coefficients that stay");  // too steep: runs away
  refused("1.5:-2", "choose coefficients that stay");      // 1 -> -0.5: the wrong sign
  refused("0:0.5:0.5", "choose coefficients that stay");   // small ones shrink
  refused("100x9:9:9", "choose coefficients that stay");   // overflows
  refused("-1.5:0.5", "choose coefficients that stay");    // the wrong sign everywhere
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

// The three regimes on matrices, which the division by ||X||_F keeps us out of.
TEST(Polar, CubicRegionsOfMatrices) {
  CpuContext ctx;
  for (const auto& [rows, cols] : {std::pair{5, 5}, {5, 6}, {5, 30}}) {
    const Matrix64 u = exact_polar(ctx, as<double>(random_matrix(rows, 5, 3))),
                   v = exact_polar(ctx, as<double>(random_matrix(5, cols, 4)));
    const auto from = [&](const std::vector<double>& sigma) {
      Matrix64 s(5, 5);
      for (int64_t i = 0; i < 5; ++i) s(i, i) = sigma[static_cast<size_t>(i)];
      return product(product(u, s), v);
    };
    const auto run = [&](const Matrix64& x) {
      Matrix64 y = x;
      const PolarMethod cubic = polar_method("cubic", 40);
      polar(ctx, {.x = y.batch(), .method = cubic, .normalize = false});
      return y;
    };
    EXPECT_LT(deviation(run(from({0.01, 0.5, 1.2, 1.5, 1.7})), from({1, 1, 1, 1, 1})), 1e-9);
    EXPECT_LT(deviation(run(from({0.5, 1.8, 1.2, 1.9, 2})), from({1, -1, 1, -1, -1})), 1e-9);
    double largest = 0;
    bool finite = true;
    for (const double x : run(from({0.5, 1, 1, 1, 2.4})).data) {
      largest = std::max(largest, std::fabs(x));
      finite = finite && std::isfinite(x);
    }
    EXPECT_TRUE(!finite || largest > 1e6) << largest;
  }
}

TEST(Polar, ExpectedMatrices) {
  check_expected_polars<float>(on_cpu);
  check_expected_polars<double>(on_cpu);
}

TEST(Polar, SameAsFloat64) {
  check_polars_in_float64<float>(on_cpu);
  check_polars_in_float64<double>(on_cpu);
}

TEST(Polar, ExactMethods) {
  check_exact_methods<float>(on_cpu);
  check_exact_methods<double>(on_cpu);
}

TEST(Polar, SketchKeepsTheLargestDirections) {
  CpuContext ctx;
  std::vector<double> values;  // a gap after the fifth
  for (int i = 0; i < 40; ++i) values.push_back(i < 5 ? 1 + 0.1 * i : 0.05 * std::pow(0.9, i));
  for (const auto& [rows, cols] : {std::pair{40, 60}, {60, 40}, {40, 40}}) {
    const Matrix64 g = as<double>(with_singular_values(ctx, rows, cols, values, 8));
    Matrix64 p = polar_of(ctx, g, polar_method("sketch:rank=5")), exact = g;
    svd_polar(ctx, exact.tensor(), {.rank = 5});
    EXPECT_LT(deviation(p, exact), 1e-5);
    std::vector<double> s(40);
    singular_values(ctx, p.tensor(), s);
    EXPECT_NEAR(s[4], 1, 1e-9);
    EXPECT_NEAR(s[5], 0, 1e-9);
    EXPECT_EQ(polar_of(ctx, g, polar_method("sketch:rank=5")).data, p.data);  // the same Omega every time
  }
}

// newton leaves x / sqrt(x^2 + d), and what is zero stays zero.
TEST(Polar, NewtonOfRankDeficientMatrices) {
  CpuContext ctx;
  for (const auto& [rows, cols] : {std::pair{20, 20}, {20, 50}, {50, 20}}) {
    const Matrix g = with_singular_values(ctx, rows, cols, {1, 0.7, 0.2}, 3);
    EXPECT_LT(deviation(polar_of(ctx, g, polar_method("newton")), as<float>(exact_rank_three(ctx, g))), 2e-3);
  }
}

// Where Grams of rows are diagonal, AOL divides every row by its length and the factor is exact; elsewhere it
// is the factor of the scaled matrix, and singular values before the first step are at most 1.
TEST(Polar, AlmostOrthogonalScaling) {
  CpuContext ctx;
  const PolarMethod aol = polar_method("aol4");
  Matrix64 rows = exact_polar(ctx, as<double>(random_matrix(6, 20, 1)));
  for (int64_t i = 0; i < 6; ++i)
    for (int64_t j = 0; j < 20; ++j) rows(i, j) *= std::pow(10.0, -static_cast<double>(i));
  const double one = aol.apply(1 / aol.safety);
  EXPECT_LT(deviation(polar_of(ctx, rows, aol), scaled(exact_polar(ctx, rows), one)), 1e-9);
  for (const auto& [m, n] : {std::pair{15, 15}, {15, 40}, {40, 15}})
    for (uint32_t seed = 0; seed < 20; ++seed) {
      const Matrix64 x = as<double>(random_matrix(m, n, seed));
      Matrix64 start = start_of(x, aol);
      EXPECT_LE(norm(ctx, {NormKind::l2_l2}, start.tensor()), 1 / aol.safety + 1e-12);
      EXPECT_GT(norm(ctx, {NormKind::l2_l2}, start.tensor()), 0.3);
    }
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
      const double rounding = method.name == "cans5" ? rounding_of<float>(method) : 2e-5;
      const Matrix g = random_matrix(rows, cols, 5), o = polar_of(ctx, g, method);
      EXPECT_LT(deviation(polar_of(ctx, g.transposed(), method).transposed(), o), rounding);
      for (const double c : {1e-20, 1e-3, 1e6})
        EXPECT_LT(deviation(polar_of(ctx, scaled(g, c), method), o), rounding) << c;
      EXPECT_LT(deviation(polar_of(ctx, scaled(g, -1), method), scaled(o, -1)), rounding);
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
    for (const char* name : {"keller5", "cubic", "aol4", "svd", "newton", "sketch:rank=4"}) {
      const PolarMethod method = polar_method(name);
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
      for (const DType dtype : {DType::f32, DType::f64})
        for (const int steps : {0, 1, 4}) {
          const std::string text = std::string(name) == "sketch" && steps > 0 ? "sketch:rank=5" : name;
          const bool takes_steps = text[0] != 's';  // svd and sketch do not
          SCOPED_TRACE(testing::Message() << text << " " << rows << " x " << cols << " " << steps);
          const PolarMethod method = polar_method(text, takes_steps ? steps : 0);
          CpuContext ctx(2, 0);
          Arena arena("test");
          Tensor batch;
          arena.add(&batch, dtype, {7, rows, cols});
          arena.allocate(ctx);
          upload(ctx, batch, random_matrix(7 * rows, cols, 1));
          ctx.scratch.reserve(polar_scratch_bytes(ctx, batch.shape, dtype, method));
          EXPECT_NO_THROW(polar(ctx, {.x = batch, .method = method}));
        }
}
