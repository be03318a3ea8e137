// Inverse roots, on the CPU and on a GPU or in the executor, by the same bodies.
#include "optim/inverse_root.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "tests/linear_algebra_fixture.h"

namespace {
/// Eigenvalues from 1 down to 1 / condition.
std::vector<double> decades(int64_t n, double condition) {
  std::vector<double> values;
  for (int64_t i = 0; i < n; ++i)
    values.push_back(
        std::pow(condition, -static_cast<double>(i) / static_cast<double>(std::max<int64_t>(n - 1, 1))));
  return values;
}
std::vector<double> powers(std::vector<double> values, double power) {
  for (double& v : values) v = std::pow(v, power);
  return values;
}

constexpr RootMethod kMethods[] = {RootMethod::eigen, RootMethod::newton};

void check_expected_roots(const Setting& setting) {
  Bench bench(setting);
  const double tolerance = setting.dtype == DType::f64 ? 1e-9 : 1e-4;
  const nlohmann::json& numbers = optim_golden().at("inverse_roots");
  const Matrix64 a(numbers.at("A"));
  Matrix64 damped = a;
  for (int64_t i = 0; i < 3; ++i) damped(i, i) += numbers.at("eps").get<double>();
  for (const int p : {2, 4}) {
    const nlohmann::json& expected = numbers.at("p" + std::to_string(p));
    InverseRoot args{.x = {}, .a = {}, .power = -1.0 / p, .eps = numbers.at("eps")};
    for (const RootMethod method : kMethods) {
      args.method = method;
      EXPECT_LT(deviation(bench.root(a, args), Matrix64(expected.at("X"))), tolerance) << p;
    }
    for (int steps = 1; steps <= 30; ++steps) {  // M = X^p A on the way
      args.steps = steps;
      const Matrix64 x = bench.root(a, args);
      Matrix64 m = damped;
      for (int k = 0; k < p; ++k) m = product(x, m);
      EXPECT_NEAR(deviation(m, identity(3)),
                  expected.at("err_inf_by_iter").at(static_cast<size_t>(steps - 1)), tolerance)
          << p << " after " << steps;
    }
  }
}

/// X^p A = I for every p; other powers against the spectrum.
void check_residuals(const Setting& setting) {
  Bench bench(setting);
  for (const int64_t n : {1, 2, 13, 48})
    for (int p = 1; p <= 8; ++p)
      for (const RootMethod method : kMethods) {
        SCOPED_TRACE(testing::Message() << "n " << n << " p " << p << " method " << static_cast<int>(method));
        const std::vector<double> values = decades(n, 100);
        const Matrix64 a = symmetric(values, 40 + static_cast<uint32_t>(p));
        const Matrix64 x = bench.root(a, {.x = {}, .a = {}, .power = -1.0 / p, .method = method});
        Matrix64 m = a;
        for (int k = 0; k < p; ++k) m = product(x, m);
        EXPECT_LT(deviation(m, identity(n)), 200 * bench.unit);
        EXPECT_LT(deviation(x, symmetric(powers(values, -1.0 / p), 40 + static_cast<uint32_t>(p))),
                  100 * bench.unit);
      }
  const std::vector<double> values = decades(20, 100);
  for (const double power : {-0.3, -0.75, -1.5})
    EXPECT_LT(deviation(bench.root(symmetric(values, 9), {.x = {}, .a = {}, .power = power}),
                        symmetric(powers(values, power), 9)),
              1000 * bench.unit);
  std::vector<double> damped = values;
  for (double& v : damped) v += 0.1;
  for (const RootMethod method : kMethods)
    EXPECT_LT(deviation(bench.root(symmetric(values, 9),
                                   {.x = {}, .a = {}, .power = -0.25, .method = method, .eps = 0.1}),
                        symmetric(powers(damped, -0.25), 9)),
              10 * bench.unit);
}

void check_special_matrices(const Setting& setting) {
  Bench bench(setting);
  // Zero.
  const InverseRoot eigen{.x = {}, .a = {}, .power = -0.25, .pseudo = true};
  const InverseRoot newton{.x = {}, .a = {}, .power = -0.25, .method = RootMethod::newton};
  for (const InverseRoot& args : {eigen, newton}) {
    for (double x : bench.root(Matrix64(5, 5), args).data) EXPECT_EQ(x, 0);
    InverseRoot with_eps = args;
    with_eps.pseudo = false;
    with_eps.eps = 1.0 / 16;
    EXPECT_LT(deviation(bench.root(Matrix64(5, 5), with_eps), scaled(identity(5), 2)), 10 * bench.unit);
    // 1 x 1, tiny and huge.
    for (const double value : {16.0, 1e-20, 1e20}) {
      Matrix64 one(1, 1);
      one(0, 0) = value;
      EXPECT_NEAR(bench.root(one, args)(0, 0) * std::pow(value, 0.25), 1, 10 * bench.unit);
    }
    for (const double scale : {1e-20, 1e20}) {
      const Matrix64 a = symmetric(decades(12, 100), 3);
      EXPECT_LT(
          deviation(bench.root(scaled(a, scale), args), scaled(bench.root(a, args), std::pow(scale, -0.25))),
          100 * bench.unit);
    }
    // A NaN stays in its own matrix.
    for (const double bad : {double{NAN}, double{INFINITY}}) {
      Matrix64 two(12, 6);
      for (int64_t i = 0; i < 12; ++i) two(i, i % 6) = 1;
      two(1, 2) = two(2, 1) = bad;
      const Matrix64 x = bench.root(two, args, 2);
      for (int64_t i = 0; i < 6; ++i)
        for (int64_t j = 0; j < 6; ++j) {
          EXPECT_TRUE(std::isnan(x(i, j))) << i << " " << j;
          EXPECT_NEAR(x(6 + i, j), i == j, 10 * bench.unit);
        }
    }
  }
}

/// Newton without a pseudo-inverse: what is singular stays finite, and is right where A is not singular, up
/// to the rounding that grows along the null space: at most by (1 + 1/p)^30, or to the root of the floor.
void check_newton_on_singular(const Setting& setting) {
  Bench bench(setting);
  const double rounding = setting.dtype == DType::f64 ? 0x1p-52 : 0x1p-23;
  for (const int64_t n : {8, 96})
    for (const double power : {-0.5, -0.25}) {
      const double growth = std::min(std::pow(1 - power, 30), std::pow(rounding, power));
      const Matrix64 g = normal(n, n / 4, 1), a = product(g, g.transposed());
      const Matrix64 x = bench.root(a, {.x = {}, .a = {}, .power = power, .method = RootMethod::newton});
      const Matrix64 exact = bench.root(a, {.x = {}, .a = {}, .power = power, .pseudo = true});
      EXPECT_LT(deviation(product(x, g), product(exact, g)),
                10 * std::sqrt(static_cast<double>(n)) * rounding * growth)
          << n << " " << power;
    }
}

void check_stopping_and_batches(const Setting& setting) {
  Bench bench(setting);
  const Matrix64 a = symmetric(decades(24, 30), 1), b = symmetric(decades(24, 500), 2);
  Matrix64 both(48, 24);
  std::copy(a.data.begin(), a.data.end(), both.data.begin());
  std::copy(b.data.begin(), b.data.end(), both.data.begin() + 24 * 24);
  InverseRoot args{.x = bench.room({2, 24, 24}),
                   .a = bench.put(both, 2),
                   .power = -0.5,
                   .method = RootMethod::newton,
                   .tolerance = 1e-4};
  const int steps = inverse_root(bench.ctx, args);
  EXPECT_GT(steps, 5);
  EXPECT_LT(steps, 25);
  const Matrix64 stopped = bench.get(args.x);
  args.tolerance = 0;
  EXPECT_EQ(inverse_root(bench.ctx, args), 30);
  const Matrix64 full = bench.get(args.x);
  EXPECT_LT(deviation(stopped, full), 1e-4);
  for (const Matrix64* alone : {&a, &b}) {
    Matrix64 part(24, 24);
    std::copy_n(full.data.begin() + (alone == &b ? 24 * 24 : 0), 24 * 24, part.data.begin());
    EXPECT_LT(
        deviation(bench.root(*alone, {.x = {}, .a = {}, .power = -0.5, .method = RootMethod::newton}), part),
        10 * bench.unit);
  }
}

void check_root_scratch(const Setting& setting) {
  for (const RootMethod method : kMethods)
    for (const int64_t n : {1, 33}) {
      const Shape shape{5, n, n};
      Context plain;
      setting.use(plain);
      Bench bench(setting, inverse_root_scratch_bytes(plain, shape, setting.dtype, method));
      Matrix64 a(5 * n, n);
      for (int64_t i = 0; i < 5 * n; ++i) a(i, i % n) = 2;
      const Matrix64 x = bench.root(a,
                                    {.x = {},
                                     .a = {},
                                     .power = -1,
                                     .method = method,
                                     .tolerance = method == RootMethod::newton ? 1e-3 : 0},
                                    5);
      EXPECT_NEAR(x(5 * n - 1, n - 1), 0.5, 1e-3);
    }
  Context plain;
  setting.use(plain);
  Bench bench(setting, std::max(qr_scratch_bytes(plain, 70, 33), symmetric_eigen_scratch_bytes(plain, 70)));
  EXPECT_NO_THROW(bench.orthonormal(normal(70, 33, 1)));
  const Tensor a = bench.put(identity(70)), values = bench.room({70});
  EXPECT_NO_THROW(symmetric_eigen(bench.ctx, {.values = values, .vectors = a, .a = a}));
}

class InverseRoots : public testing::TestWithParam<Setting> {};
}  // namespace

INSTANTIATE_TEST_SUITE_P(On, InverseRoots, testing::ValuesIn(settings()), setting_name);

TEST_P(InverseRoots, Expected) {
  check_expected_roots(GetParam());
}
TEST_P(InverseRoots, Residuals) {
  check_residuals(GetParam());
}
TEST_P(InverseRoots, ZeroTinyHugeAndNaN) {
  check_special_matrices(GetParam());
}
TEST_P(InverseRoots, NewtonOnSingularMatrices) {
  check_newton_on_singular(GetParam());
}
TEST_P(InverseRoots, NewtonStopsAndTakesBatches) {
  check_stopping_and_batches(GetParam());
}
TEST_P(InverseRoots, ScratchIsWhatIsPublished) {
  check_root_scratch(GetParam());
}

TEST(InverseRoot, OrdersOfNewton) {
  EXPECT_EQ(newton_order(-1), 1);
  EXPECT_EQ(newton_order(-0.25), 4);
  EXPECT_EQ(newton_order(-1.0 / 7), 7);
  EXPECT_EQ(newton_order(-0.3), 0);
  EXPECT_EQ(newton_order(-1.0 / 9), 0);
  EXPECT_EQ(newton_order(0.5), 0);
  CpuContext ctx;
  Matrix a(3, 3);
  EXPECT_THROW(
      inverse_root(ctx, {.x = a.batch(), .a = a.batch(), .power = -0.3, .method = RootMethod::newton}),
      ShapeError);
}
