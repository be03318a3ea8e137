// Eigenvalues, orthonormal bases and inverse roots, on the CPU and on a GPU or in the executor, by the same
// bodies.
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <random>

#include "optim/eigen.h"
#include "optim/inverse_root.h"
#include "optim/svd.h"
#include "tests/optim_golden.h"

namespace {
/// A matrix in float64 on the host.
struct Dense {
  int64_t rows = 0, cols = 0;
  std::vector<double> data;

  Dense(int64_t rows, int64_t cols) : rows(rows), cols(cols), data(static_cast<size_t>(rows * cols)) {}
  explicit Dense(const nlohmann::json& lists)
      : Dense(static_cast<int64_t>(lists.size()), static_cast<int64_t>(lists.at(0).size())) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j)
        (*this)(i, j) = lists.at(static_cast<size_t>(i)).at(static_cast<size_t>(j));
  }
  double& operator()(int64_t i, int64_t j) { return data[static_cast<size_t>(i * cols + j)]; }
  double operator()(int64_t i, int64_t j) const { return data[static_cast<size_t>(i * cols + j)]; }
};

Dense normal(int64_t rows, int64_t cols, uint32_t seed) {
  Dense m(rows, cols);
  std::mt19937 random(seed);
  std::normal_distribution<double> distribution;
  for (double& x : m.data) x = distribution(random);
  return m;
}
Dense identity(int64_t n) {
  Dense m(n, n);
  for (int64_t i = 0; i < n; ++i) m(i, i) = 1;
  return m;
}
Dense transposed(const Dense& m) {
  Dense t(m.cols, m.rows);
  for (int64_t i = 0; i < m.rows; ++i)
    for (int64_t j = 0; j < m.cols; ++j) t(j, i) = m(i, j);
  return t;
}
Dense scaled(Dense m, double c) {
  for (double& x : m.data) x *= c;
  return m;
}
Dense operator*(const Dense& a, const Dense& b) {
  Dense c(a.rows, b.cols);
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t k = 0; k < a.cols; ++k)
      for (int64_t j = 0; j < b.cols; ++j) c(i, j) += a(i, k) * b(k, j);
  return c;
}
/// The largest |a - b| over the largest |b|, or NaN.
double deviation(const Dense& a, const Dense& b) {
  double difference = 0, largest = 1e-300;
  for (size_t i = 0; i < b.data.size(); ++i) {
    if (std::isnan(a.data.at(i))) return a.data[i];
    difference = std::max(difference, std::fabs(a.data[i] - b.data[i]));
    largest = std::max(largest, std::fabs(b.data[i]));
  }
  return difference / largest;
}
bool all_nan(const Dense& m) {
  return std::all_of(m.data.begin(), m.data.end(), [](double x) { return std::isnan(x); });
}

/// Matrix i of those below one another.
Dense part(const Dense& all, int64_t i, int64_t rows) {
  Dense m(rows, all.cols);
  std::copy_n(&all.data[static_cast<size_t>(i * rows * all.cols)], rows * all.cols, m.data.begin());
  return m;
}

/// Where and in which numbers a body runs, with the accuracy of those.
struct Setting {
  UseDevice use;
  DType dtype;
  double unit() const { return dtype == DType::f64 ? 1e-13 : 1e-6; }
};

/// A context with the setting's dtype, and the way there and back.
class Bench {
 public:
  explicit Bench(const Setting& setting, int64_t scratch_bytes = int64_t{16} << 20)
      : unit(setting.unit()), dtype_(setting.dtype) {
    setting.use(ctx);
    ctx.scratch.reserve(scratch_bytes);
  }

  /// `batch` matrices below one another, as (batch, rows / batch, cols); or (rows, cols) for batch 0.
  Tensor put(const Dense& m, int64_t batch = 0) {
    Shape shape{m.rows, m.cols};
    if (batch > 0) shape = {batch, m.rows / batch, m.cols};
    const Tensor there = room(shape);
    OnHost here(ctx, there, /*load=*/false);
    store_doubles(*here, [&](int64_t i) { return m.data[static_cast<size_t>(i)]; });
    here.store();
    return there;
  }
  Tensor room(const Shape& shape) {
    arenas_.push_back(std::make_unique<Arena>("test"));
    tensors_.push_back(std::make_unique<Tensor>());
    arenas_.back()->add(tensors_.back().get(), dtype_, shape);
    arenas_.back()->allocate(ctx);
    return *tensors_.back();
  }
  Dense get(const Tensor& there) {
    Dense m(there.rows(), there.cols());
    load_doubles(m.data.data(), *OnHost(ctx, there));
    return m;
  }
  /// What the tensor holds after rounding to the dtype.
  Dense rounded(const Dense& m) { return get(put(m)); }

  /// The root of each of `batch` matrices below one another.
  Dense root(const Dense& a, InverseRoot args, int64_t batch = 1) {
    args.x = args.a = put(a, batch);
    inverse_root(ctx, args);
    return get(args.x);
  }
  Dense orthonormal(const Dense& x) {
    const Tensor q = put(x);
    qr(ctx, {.q = q, .x = q});
    return get(q);
  }

  Context ctx;
  double unit;

 private:
  DType dtype_;
  std::vector<std::unique_ptr<Arena>> arenas_;
  std::vector<std::unique_ptr<Tensor>> tensors_;
};

/// Q diag(values) Q^T with a random orthogonal Q, in float64.
Dense symmetric(const std::vector<double>& values, uint32_t seed) {
  Bench host({on_cpu, DType::f64});
  const auto n = static_cast<int64_t>(values.size());
  const Dense q = host.orthonormal(normal(n, n, seed));
  Dense scaled_columns = q;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) scaled_columns(i, j) *= values[static_cast<size_t>(j)];
  Dense a = scaled_columns * transposed(q);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < i; ++j) a(i, j) = a(j, i);
  return a;
}
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

void check_eigen(const Setting& setting) {
  Bench bench(setting);
  for (const int64_t n : {1, 2, 17, 40})
    for (const double scale : {1.0, 1e-20, 1e20}) {
      SCOPED_TRACE(testing::Message() << n << " scaled " << scale);
      std::vector<double> expected;  // negative ones, and equal ones
      for (int64_t i = 0; i < n; ++i) {
        const int64_t pair = i / 2;  // every eigenvalue twice
        expected.push_back(static_cast<double>(pair) - 3);
      }
      const Dense a = bench.rounded(scaled(symmetric(expected, 5), scale));
      const Tensor vectors = bench.put(a), values = bench.room({n});
      symmetric_eigen(bench.ctx, {.values = values, .vectors = vectors, .a = vectors});
      const Dense v = bench.get(vectors), found = bench.get(values);
      Dense diagonal(n, n);
      for (int64_t i = 0; i < n; ++i) {
        diagonal(i, i) = found.data[static_cast<size_t>(i)];
        EXPECT_NEAR(found.data[static_cast<size_t>(i)] / scale, expected[static_cast<size_t>(i)],
                    20 * bench.unit);
      }
      EXPECT_LT(deviation(transposed(v) * v, identity(n)), 10 * bench.unit);
      EXPECT_LT(deviation(v * diagonal * transposed(v), a), 10 * bench.unit);
    }
  Dense bad = identity(4);
  bad(3, 1) = NAN;
  const Tensor vectors = bench.put(bad), values = bench.room({4});
  symmetric_eigen(bench.ctx, {.values = values, .vectors = vectors, .a = vectors});
  EXPECT_TRUE(all_nan(bench.get(vectors)) && all_nan(bench.get(values)));
}

/// More matrices than threads, one of them not finite: each as if it were alone, whatever the threads.
void check_side_by_side(const Setting& setting) {
  constexpr int64_t kCount = 5, m = 24, r = 10;
  for (const int threads : {1, 2, 3, 8}) {
    SCOPED_TRACE(testing::Message() << threads << " threads");
    Bench bench(setting);
    bench.ctx.threads = threads;
    Dense x = normal(kCount * m, r, 4), a(kCount * m, m);
    for (int64_t i = 0; i < kCount; ++i) {
      std::vector<double> values(static_cast<size_t>(m), 1 + static_cast<double>(i));
      const Dense one = symmetric(values, static_cast<uint32_t>(i));
      std::copy(one.data.begin(), one.data.end(), a.data.begin() + i * m * m);
    }
    x(3 * m, 2) = a(3 * m + 1, 1) = NAN;
    const Tensor there = bench.put(x, kCount);
    std::vector<Qr> list;
    for (int64_t i = 0; i < kCount; ++i) list.push_back({.q = there[i], .x = there[i]});
    qr(bench.ctx, list);
    const Dense roots = bench.root(a, {.x = {}, .a = {}, .power = -0.5, .method = RootMethod::eigen}, kCount);
    for (int64_t i = 0; i < kCount; ++i) {
      const Dense q = bench.get(list[static_cast<size_t>(i)].q), root = part(roots, i, m);
      if (i == 3) {
        EXPECT_TRUE(all_nan(q) && all_nan(root));
        continue;
      }
      EXPECT_LT(deviation(q, bench.orthonormal(part(x, i, m))), 10 * bench.unit);
      EXPECT_LT(deviation(root, scaled(identity(m), 1 / std::sqrt(1.0 + static_cast<double>(i)))),
                10 * bench.unit);
    }
  }
}

void check_qr(const Setting& setting) {
  Bench bench(setting);
  for (const auto& [m, r] :
       {std::pair<int64_t, int64_t>{1, 1}, {5, 1}, {6, 6}, {31, 7}, {64, 40}, {210, 200}})
    for (const double scale : {1.0, 1e-20}) {
      SCOPED_TRACE(testing::Message() << m << " x " << r << " scaled " << scale);
      const Dense x = bench.rounded(scaled(normal(m, r, 3), scale)), q = bench.orthonormal(x);
      EXPECT_LT(deviation(transposed(q) * q, identity(r)), 10 * bench.unit);
      Dense upper = transposed(q) * x;
      for (int64_t i = 0; i < r; ++i)
        for (int64_t j = 0; j < i; ++j) {
          EXPECT_LT(std::fabs(upper(i, j)) / scale, 40 * bench.unit);
          upper(i, j) = 0;
        }
      EXPECT_LT(deviation(q * upper, x), 10 * bench.unit);
      if (m > 1) {
        EXPECT_LT(upper(0, 0) * x(0, 0), 0);  // the sign convention
      }
    }
  Dense gap = normal(9, 4, 8);  // a column of zeros, and one twice
  for (int64_t i = 0; i < 9; ++i) {
    gap(i, 1) = 0;
    gap(i, 3) = gap(i, 2);
  }
  gap = bench.rounded(gap);
  const Dense q = bench.orthonormal(gap), r = transposed(q) * gap;
  EXPECT_LT(deviation(transposed(q) * q, identity(4)), 10 * bench.unit);
  EXPECT_LT(deviation(q * r, gap), 10 * bench.unit);
  EXPECT_NEAR(r(1, 1), 0, 10 * bench.unit);
  EXPECT_NEAR(r(3, 3), 0, 10 * bench.unit);
  const Dense of_zero = bench.orthonormal(Dense(5, 3));
  for (int64_t i = 0; i < 5; ++i)
    for (int64_t j = 0; j < 3; ++j) EXPECT_EQ(of_zero(i, j), i == j);
  gap(8, 0) = INFINITY;
  EXPECT_TRUE(all_nan(bench.orthonormal(gap)));
  EXPECT_THROW(bench.orthonormal(Dense(3, 4)), ShapeError);
}

constexpr RootMethod kMethods[] = {RootMethod::eigen, RootMethod::newton};

void check_expected_roots(const Setting& setting) {
  Bench bench(setting);
  const double tolerance = setting.dtype == DType::f64 ? 1e-9 : 1e-4;
  const nlohmann::json& numbers = optim_golden().at("inverse_roots");
  const Dense a(numbers.at("A"));
  Dense damped = a;
  for (int64_t i = 0; i < 3; ++i) damped(i, i) += numbers.at("eps").get<double>();
  for (const int p : {2, 4}) {
    const nlohmann::json& expected = numbers.at("p" + std::to_string(p));
    InverseRoot args{.x = {}, .a = {}, .power = -1.0 / p, .eps = numbers.at("eps")};
    for (const RootMethod method : kMethods) {
      args.method = method;
      EXPECT_LT(deviation(bench.root(a, args), Dense(expected.at("X"))), tolerance) << p;
    }
    for (int steps = 1; steps <= 30; ++steps) {  // M = X^p A on the way
      args.steps = steps;
      const Dense x = bench.root(a, args);
      Dense m = damped;
      for (int k = 0; k < p; ++k) m = x * m;
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
        const Dense a = symmetric(values, 40 + static_cast<uint32_t>(p));
        const Dense x = bench.root(a, {.x = {}, .a = {}, .power = -1.0 / p, .method = method});
        Dense m = a;
        for (int k = 0; k < p; ++k) m = x * m;
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
    for (double x : bench.root(Dense(5, 5), args).data) EXPECT_EQ(x, 0);
    InverseRoot with_eps = args;
    with_eps.pseudo = false;
    with_eps.eps = 1.0 / 16;
    EXPECT_LT(deviation(bench.root(Dense(5, 5), with_eps), scaled(identity(5), 2)), 10 * bench.unit);
    // 1 x 1, tiny and huge.
    for (const double value : {16.0, 1e-20, 1e20}) {
      Dense one(1, 1);
      one(0, 0) = value;
      EXPECT_NEAR(bench.root(one, args)(0, 0) * std::pow(value, 0.25), 1, 10 * bench.unit);
    }
    for (const double scale : {1e-20, 1e20}) {
      const Dense a = symmetric(decades(12, 100), 3);
      EXPECT_LT(
          deviation(bench.root(scaled(a, scale), args), scaled(bench.root(a, args), std::pow(scale, -0.25))),
          100 * bench.unit);
    }
    // A NaN stays in its own matrix.
    for (const double bad : {double{NAN}, double{INFINITY}}) {
      Dense two(12, 6);
      for (int64_t i = 0; i < 12; ++i) two(i, i % 6) = 1;
      two(1, 2) = two(2, 1) = bad;
      const Dense x = bench.root(two, args, 2);
      for (int64_t i = 0; i < 6; ++i)
        for (int64_t j = 0; j < 6; ++j) {
          EXPECT_TRUE(std::isnan(x(i, j))) << i << " " << j;
          EXPECT_NEAR(x(6 + i, j), i == j, 10 * bench.unit);
        }
    }
  }
}

/// (G G^T)^(-1/4) G (G^T G)^(-1/4) = U V^T, also of rank 1 and 3 (equations 15 and 16 of arXiv 2409.20325).
void check_pseudo_inverse(const Setting& setting) {
  Bench bench(setting);
  for (const int64_t rank : {1, 3, 9}) {
    const Dense g = normal(14, rank, 1) * normal(rank, 9, 2);
    const InverseRoot args{.x = {}, .a = {}, .power = -0.25, .pseudo = true};
    const Dense left = bench.root(g * transposed(g), args), right = bench.root(transposed(g) * g, args);
    Bench host({on_cpu, DType::f64});
    const Tensor polar = host.put(g);
    svd_polar(host.ctx, polar);
    EXPECT_LT(deviation(left * g * right, host.get(polar)), 100 * bench.unit) << rank;
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
      const Dense g = normal(n, n / 4, 1), a = g * transposed(g);
      const Dense x = bench.root(a, {.x = {}, .a = {}, .power = power, .method = RootMethod::newton});
      const Dense exact = bench.root(a, {.x = {}, .a = {}, .power = power, .pseudo = true});
      EXPECT_LT(deviation(x * g, exact * g), 10 * std::sqrt(static_cast<double>(n)) * rounding * growth)
          << n << " " << power;
    }
}

void check_stopping_and_batches(const Setting& setting) {
  Bench bench(setting);
  const Dense a = symmetric(decades(24, 30), 1), b = symmetric(decades(24, 500), 2);
  Dense both(48, 24);
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
  const Dense stopped = bench.get(args.x);
  args.tolerance = 0;
  EXPECT_EQ(inverse_root(bench.ctx, args), 30);
  const Dense full = bench.get(args.x);
  EXPECT_LT(deviation(stopped, full), 1e-4);
  for (const Dense* alone : {&a, &b}) {
    Dense part(24, 24);
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
      Dense a(5 * n, n);
      for (int64_t i = 0; i < 5 * n; ++i) a(i, i % n) = 2;
      const Dense x = bench.root(a,
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

void on_gpu(Context& ctx) {
  use_gpu(ctx, 0, DType::f32);
}
std::vector<Setting> settings(std::initializer_list<DType> dtypes) {
  std::vector<Setting> all;
  for (const DType dtype : dtypes) {
    all.push_back({on_cpu, dtype});
    if (kHaveGpu) all.push_back({on_gpu, dtype});
  }
  return all;
}
std::string setting_name(const testing::TestParamInfo<Setting>& info) {
  return std::string(info.param.use == on_cpu ? "Cpu" : "Gpu") +
         (info.param.dtype == DType::f64 ? "F64" : "F32");
}
class LinearAlgebra : public testing::TestWithParam<Setting> {};  // by LAPACK
class InverseRoots : public testing::TestWithParam<Setting> {};
}  // namespace

INSTANTIATE_TEST_SUITE_P(On, LinearAlgebra, testing::ValuesIn(settings({DType::f32, DType::f64})),
                         setting_name);
INSTANTIATE_TEST_SUITE_P(On, InverseRoots, testing::ValuesIn(settings({DType::f32, DType::f64})),
                         setting_name);

TEST_P(LinearAlgebra, SymmetricEigen) {
  check_eigen(GetParam());
}
TEST_P(LinearAlgebra, SideBySide) {
  check_side_by_side(GetParam());
}
TEST_P(LinearAlgebra, Qr) {
  check_qr(GetParam());
}
TEST_P(InverseRoots, Expected) {
  check_expected_roots(GetParam());
}
TEST_P(InverseRoots, Residuals) {
  check_residuals(GetParam());
}
TEST_P(InverseRoots, ZeroTinyHugeAndNaN) {
  check_special_matrices(GetParam());
}
TEST_P(LinearAlgebra, PseudoInverseGivesThePolarFactor) {
  check_pseudo_inverse(GetParam());
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

TEST(HostRoom, WhatOneThreadThrowsReachesTheCaller) {
  Context ctx;
  use_cpu(ctx, 2);
  ctx.scratch.reserve(1024);
  const auto too_much = [](int64_t i, HostRoom& room) { room.doubles(i == 1 ? 5 : 4); };
  EXPECT_THROW(side_by_side(ctx, 2, 4, too_much), ShapeError);
  EXPECT_NO_THROW(side_by_side(ctx, 1, 4, too_much));
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
