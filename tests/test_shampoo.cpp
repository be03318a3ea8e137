// shampoo, oneside and soap on the CPU and on a GPU or in the executor, by the same bodies: expected numbers,
// oracles in plain float64 loops, and what must hold whatever the numbers are.
#include <gtest/gtest.h>

#include <fmt/format.h>

#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <numeric>

#include "model/kernels/stream.h"
#include "optim/pieces.h"
#include "optim/svd.h"
#include "tests/optim_fixture.h"

namespace {

/// f32 and f64, with the tolerance for results that go through roots.
template <typename T>
struct Number {
  using type = T;
  static constexpr double tolerance = sizeof(T) == 8 ? 1e-9 : 1e-4;
};
template <typename Body>
void in_both_dtypes(Body&& body) {
  for (const UseDevice use : both_devices()) {
    SCOPED_TRACE(use == on_cpu ? "cpu" : "gpu");
    {
      SCOPED_TRACE("f32");
      body(Number<float>{}, use);
    }
    SCOPED_TRACE("f64");
    body(Number<double>{}, use);
  }
}

template <typename T>
MatrixOf<T> cast(const Matrix64& m) {
  MatrixOf<T> to(m.rows, m.cols);
  for (size_t i = 0; i < m.data.size(); ++i) to.data[i] = static_cast<T>(m.data[i]);
  return to;
}
/// Standard normal numbers that f32 holds, so that both dtypes see the same.
Matrix64 normal(int64_t rows, int64_t cols, uint32_t seed) {
  const Matrix m = random_matrix(rows, cols, seed);
  Matrix64 to(rows, cols);
  std::copy(m.data.begin(), m.data.end(), to.data.begin());
  return to;
}
/// Of this rank, exactly, in either dtype: products of small integers.
Matrix64 of_rank(int64_t rank, int64_t rows, int64_t cols, uint32_t seed) {
  Matrix64 a = normal(rows, rank, seed), b = normal(rank, cols, seed + 1);
  for (Matrix64* m : {&a, &b})
    for (double& x : m->data) x = std::round(2 * x);
  return product(a, b);
}
Matrix64 identity(int64_t n) {
  Matrix64 m(n, n);
  for (int64_t i = 0; i < n; ++i) m(i, i) = 1;
  return m;
}
Matrix64 sum(double a, const Matrix64& x, double b, const Matrix64& y) {
  Matrix64 z = x;
  for (size_t i = 0; i < z.data.size(); ++i) z.data[i] = a * x.data[i] + b * y.data[i];
  return z;
}

struct Eigen {
  std::vector<double> values;  // ascending
  Matrix64 vectors;            // column k belongs to value k
};
/// Jacobi's rotations.
Eigen jacobi(Matrix64 a) {
  const int64_t n = a.rows;
  Matrix64 v = identity(n);
  for (int sweep = 0; sweep < 60; ++sweep)
    for (int64_t p = 0; p < n; ++p)
      for (int64_t q = p + 1; q < n; ++q) {
        if (a(p, q) == 0) continue;
        const double angle = 0.5 * std::atan2(2 * a(p, q), a(q, q) - a(p, p)), c = std::cos(angle),
                     s = std::sin(angle);
        for (int64_t k = 0; k < n; ++k) {
          const double x = a(k, p), y = a(k, q);
          a(k, p) = c * x - s * y, a(k, q) = s * x + c * y;
        }
        for (int64_t k = 0; k < n; ++k) {
          const double x = a(p, k), y = a(q, k);
          a(p, k) = c * x - s * y, a(q, k) = s * x + c * y;
        }
        for (int64_t k = 0; k < n; ++k) {
          const double x = v(k, p), y = v(k, q);
          v(k, p) = c * x - s * y, v(k, q) = s * x + c * y;
        }
      }
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::ranges::sort(order, [&](int64_t i, int64_t j) { return a(i, i) < a(j, j); });
  Eigen sorted{.values = {}, .vectors = Matrix64(n, n)};
  for (int64_t k = 0; k < n; ++k) {
    const int64_t from = order[static_cast<size_t>(k)];
    sorted.values.push_back(a(from, from));
    for (int64_t i = 0; i < n; ++i) sorted.vectors(i, k) = v(i, from);
  }
  return sorted;
}
/// (A + eps I)^power
Matrix64 power_of(const Matrix64& a, double power, double eps) {
  const Eigen eigen = jacobi(a);
  Matrix64 scaled_vectors = eigen.vectors;
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t k = 0; k < a.rows; ++k)
      scaled_vectors(i, k) *= std::pow(std::max(eigen.values[static_cast<size_t>(k)], 0.0) + eps, power);
  return product(scaled_vectors, eigen.vectors.transposed());
}
/// Q of X = Q R by Gram and Schmidt, twice over.
Matrix64 orthonormal(Matrix64 x) {
  for (int64_t k = 0; k < x.cols; ++k) {
    for (int pass = 0; pass < 2; ++pass)
      for (int64_t j = 0; j < k; ++j) {
        double along = 0;
        for (int64_t i = 0; i < x.rows; ++i) along += x(i, j) * x(i, k);
        for (int64_t i = 0; i < x.rows; ++i) x(i, k) -= along * x(i, j);
      }
    double square = 0;
    for (int64_t i = 0; i < x.rows; ++i) square += x(i, k) * x(i, k);
    for (int64_t i = 0; i < x.rows; ++i) x(i, k) /= std::sqrt(square);
  }
  return x;
}
double size_of(const Matrix64& m) {
  return std::sqrt(inner(m, m));
}

/// Shampoo's formulas by themselves.
struct ShampooOracle {
  double beta = 0.95, momentum = 0.9, exponent = -0.25, eps = 1e-6, graft_beta2 = 0.95, graft_eps = 1e-8;
  bool nesterov = false, bias_correction = true, left = true, right = true, graft = true;
  int freq = 1, t = 0;
  Matrix64 L = {}, R = {}, m = {}, v = {}, root_L = {}, root_R = {};

  Matrix64 direction(const Matrix64& g) {
    if (t++ == 0) {
      L = Matrix64(g.rows, g.rows), R = Matrix64(g.cols, g.cols), m = v = Matrix64(g.rows, g.cols);
      root_L = identity(g.rows), root_R = identity(g.cols);
    }
    L = sum(beta, L, 1 - beta, product(g, g.transposed()));
    R = sum(beta, R, 1 - beta, product(g.transposed(), g));
    const double c = bias_correction ? 1 - std::pow(beta, t) : 1;
    if ((t - 1) % freq == 0) {
      if (left) root_L = power_of(scaled(L, 1 / c), exponent, eps);
      if (right) root_R = power_of(scaled(R, 1 / c), exponent, eps);
    }
    m = sum(momentum, m, 1 - momentum, g);
    Matrix64 mean = nesterov ? sum(momentum, m, 1 - momentum, g) : m;
    if (bias_correction) mean = scaled(mean, 1 / (1 - std::pow(momentum, t + (nesterov ? 1 : 0))));
    Matrix64 u = product(product(root_L, mean), root_R);
    if (!graft) return u;
    Matrix64 a = g;
    for (size_t i = 0; i < a.data.size(); ++i) {
      v.data[i] = graft_beta2 * v.data[i] + (1 - graft_beta2) * g.data[i] * g.data[i];
      a.data[i] /= std::sqrt(v.data[i] / (1 - std::pow(graft_beta2, t))) + graft_eps;
    }
    return scaled(u, size_of(a) / size_of(u));
  }
};

/// SOAP's formulas by themselves: m is rotated anew at every step, bases are by Jacobi and Gram-Schmidt.
struct SoapOracle {
  double beta = 0.95, beta1 = 0.95, beta2 = 0.95, eps = 1e-8;
  bool left = true, right = true;
  int freq = 10, t = 0;
  Matrix64 L = {}, R = {}, QL = {}, QR = {}, m = {}, v = {};

  Matrix64 direction(const Matrix64& g) {
    Matrix64 u(g.rows, g.cols);
    if (t++ == 0) {
      L = Matrix64(g.rows, g.rows), R = Matrix64(g.cols, g.cols), m = v = u;
      QL = identity(g.rows), QR = identity(g.cols);
    } else {
      const auto rotated = [&](const Matrix64& x) { return product(product(QL.transposed(), x), QR); };
      m = sum(beta1, m, 1 - beta1, g);
      const Matrix64 x = rotated(g), mean = rotated(m);
      for (size_t i = 0; i < u.data.size(); ++i) {
        v.data[i] = beta2 * v.data[i] + (1 - beta2) * x.data[i] * x.data[i];
        u.data[i] = mean.data[i] / (1 - std::pow(beta1, t - 1)) /
                    (std::sqrt(v.data[i] / (1 - std::pow(beta2, t - 1))) + eps);
      }
      u = product(product(QL, u), QR.transposed());
    }
    L = sum(beta, L, 1 - beta, product(g, g.transposed()));
    R = sum(beta, R, 1 - beta, product(g.transposed(), g));
    if (t == 1 || (t - 1) % freq == 0) {
      if (left) QL = t == 1 ? jacobi(L).vectors : orthonormal(product(L, QL));
      if (right) QR = t == 1 ? jacobi(R).vectors : orthonormal(product(R, QR));
    }
    return u;
  }
};

/// The directions of a rule on some gradients.
template <typename T>
std::vector<MatrixOf<T>> directions(const std::string& rule, const std::vector<Matrix64>& gradients,
                                    UseDevice use, bool transposed = false) {
  RuleDriverOf<T> driver(rule, {MatrixOf<T>(gradients[0].rows, gradients[0].cols)}, transposed, use);
  std::vector<MatrixOf<T>> list;
  for (const Matrix64& g : gradients) {
    driver.step({cast<T>(g)});
    list.push_back(driver.direction());
  }
  return list;
}
std::vector<Matrix64> normals(int count, int64_t rows, int64_t cols, uint32_t seed) {
  std::vector<Matrix64> list;
  for (int t = 0; t < count; ++t) list.push_back(normal(rows, cols, seed + static_cast<uint32_t>(t)));
  return list;
}
template <typename T>
void expect_same(const std::vector<MatrixOf<T>>& got, const std::vector<MatrixOf<T>>& want,
                 double tolerance) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t t = 0; t < want.size(); ++t) EXPECT_LT(deviation(got[t], want[t]), tolerance) << "step " << t;
}
template <typename T, typename Oracle>
void expect_oracle(const std::string& rule, Oracle oracle, const std::vector<Matrix64>& gradients,
                   UseDevice use, double tolerance) {
  SCOPED_TRACE(rule);
  std::vector<MatrixOf<T>> want;
  for (const Matrix64& g : gradients) want.push_back(cast<T>(oracle.direction(g)));
  expect_same(directions<T>(rule, gradients, use), want, tolerance);
}
}  // namespace

TEST(Shampoo, ExpectedTrajectories) {
  const std::pair<const char*, const char*> kExpected[] = {
      {"shampoo_no_accum", "shampoo:lr=0.05,momentum=0,graft=none,accumulate=none"},
      {"shampoo_sum", "shampoo:lr=0.05,momentum=0,graft=none,freq=1,eps=1e-6,accumulate=sum"},
      {"shampoo_sum_half",
       "shampoo:lr=0.05,momentum=0,graft=none,freq=1,eps=1e-6,accumulate=sum,exponent=-0.5"},
      {"shampoo_ema", "shampoo:lr=0.05,momentum=0,graft=none,freq=1,eps=1e-6"},
      {"shampoo_ema", "shampoo:lr=0.05,momentum=0,graft=none,freq=1,eps=1e-6,root=newton,steps=60"},
      {"shampoo_ema_adam_graft", "shampoo:lr=0.01,momentum=0,freq=1,eps=1e-6"},
  };
  in_both_dtypes([&](auto number, UseDevice use) {
    using T = typename decltype(number)::type;
    for (const auto& [name, rule] : kExpected) {
      SCOPED_TRACE(rule);
      const nlohmann::json& weights = optim_golden().at("optimizers").at(name).at("W");
      const MatrixOf<T> start(optim_golden().at("W0"));
      RuleDriverOf<T> driver(rule, {start}, false, use), stored(rule, {start.transposed()}, true, use);
      for (size_t t = 0; t < 3; ++t) {
        const MatrixOf<T> g(optim_golden().at("G").at(t)), want(weights.at(t));
        driver.step({g});
        stored.step({g.transposed()});
        EXPECT_LT(deviation(driver.weight(), want), number.tolerance) << t;
        EXPECT_LT(deviation(stored.weight().transposed(), want), number.tolerance) << t;
      }
    }
  });
}

TEST(Shampoo, WithoutAccumulationItIsSpectral) {
  in_both_dtypes([](auto number, UseDevice use) {
    using T = typename decltype(number)::type;
    for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{6, 6}, {9, 4}, {3, 8}, {1, 7}, {7, 1}})
      for (const int64_t rank : {int64_t{1}, int64_t{2}, std::min(rows, cols)}) {
        SCOPED_TRACE(testing::Message() << rows << " x " << cols << " of rank " << rank);
        std::vector<Matrix64> gradients;
        for (const double size : {1.0, 0x1p-66, 0x1p40}) {
          const auto seed = static_cast<uint32_t>(90 + gradients.size());
          const bool full = rank == std::min(rows, cols);
          gradients.push_back(
              scaled(full ? normal(rows, cols, seed) : of_rank(rank, rows, cols, seed), size));
        }
        const auto polar = directions<T>("spectral:ns=svd", gradients, use);
        const std::string rule = "shampoo:accumulate=none,momentum=0,graft=none";
        // Random square matrices are less well conditioned than the others.
        const double tolerance = sizeof(T) == 8 ? 1e-9 : 1e-4;
        expect_same(directions<T>(rule, gradients, use), polar, tolerance);
        expect_same(directions<T>(rule + ",sides=one", gradients, use), polar, tolerance);
      }
    // With momentum it is Muon with exact polar factors, over a trajectory.
    const auto gradients = normals(4, 4, 9, 3);
    expect_same(directions<T>("shampoo:accumulate=none,momentum=0.9,nesterov=1,graft=none", gradients, use),
                directions<T>("muon:momentum=0.9,ns=svd,scale=none", gradients, use), number.tolerance);
    // A dual vector of l2-l2, whose dual norm is the nuclear norm.
    const double dual =
        RuleDriverOf<T>("shampoo:accumulate=none,momentum=0,graft=none", {MatrixOf<T>(4, 9)}, false, use)
            .step({cast<T>(gradients[0])}, /*sharpness=*/2);
    double nuclear = 0;
    for (const double v : jacobi(product(gradients[0], gradients[0].transposed())).values)
      nuclear += std::sqrt(v);
    EXPECT_NEAR(dual / (nuclear / 2), 1, number.tolerance);
    // Shampoo^2 is another thing: U S^-1 V^T, which changes inversely to the gradient.
    const auto squared = directions<T>("shampoo:accumulate=none,momentum=0,graft=none,exponent=-0.5",
                                       {gradients[0], scaled(gradients[0], 4)}, use);
    const Matrix64 inverse =
        product(power_of(product(gradients[0], gradients[0].transposed()), -1, 0), gradients[0]);
    EXPECT_LT(deviation(squared[0], cast<T>(inverse)), 10 * number.tolerance);
    EXPECT_LT(deviation(squared[1], cast<T>(scaled(inverse, 0.25))), 10 * number.tolerance);
  });
}

TEST(Shampoo, SameAsAnOracle) {
  in_both_dtypes([](auto number, UseDevice use) {
    using T = typename decltype(number)::type;
    const auto gradients = normals(7, 5, 6, 20);
    const auto check = [&](const std::string& rule, const ShampooOracle& oracle) {
      expect_oracle<T>(rule, oracle, gradients, use, 5 * number.tolerance);
    };
    check("shampoo:eps=1e-3,freq=3", {.eps = 1e-3, .freq = 3});
    check("shampoo:eps=1e-3,freq=3,root=newton", {.eps = 1e-3, .freq = 3});
    check("shampoo:eps=1e-3,freq=1,momentum=0.5,nesterov=1,graft=none,beta=0.8",
          {.beta = 0.8, .momentum = 0.5, .eps = 1e-3, .nesterov = true, .graft = false});
    check("shampoo:eps=1e-3,freq=2,bias_correction=0,graft=none",
          {.eps = 1e-3, .bias_correction = false, .graft = false, .freq = 2});
    check("oneside:eps=1e-3",
          {.beta = 0.9, .exponent = -0.5, .eps = 1e-3, .graft_beta2 = 0.9, .right = false});
    check("oneside", {.beta = 0.9, .exponent = -0.5, .eps = 0, .graft_beta2 = 0.9, .right = false});
    check("shampoo:eps=1e-3,sides=one,exponent=-0.25,freq=1", {.eps = 1e-3, .right = false});
  });
}

// A matrix that is cut is so many matrices, in momentum, factors and grafting.
TEST(Shampoo, PiecesAreMatrices) {
  in_both_dtypes([](auto number, UseDevice use) {
    using T = typename decltype(number)::type;
    for (const std::string rule :
         {"shampoo:eps=1e-3,freq=2", "oneside:momentum=0.5", "shampoo:accumulate=none,graft=sgd"})
      for (const int64_t side : {4, 10}) {
        SCOPED_TRACE(rule + " by " + std::to_string(side));
        const std::string key = rule + ",block=" + std::to_string(side);
        const auto gradients = normals(3, 7, 10, 50);
        RuleDriverOf<T> whole(key, {MatrixOf<T>(7, 10)}, false, use);
        struct Piece {
          int64_t row, col, rows, cols;
          RuleDriverOf<T> driver;
        };
        std::vector<std::unique_ptr<Piece>> pieces;
        for (int64_t i = 0; i < 7; i += side)
          for (int64_t j = 0; j < 10; j += side) {
            const int64_t rows = std::min<int64_t>(side, 7 - i), cols = std::min<int64_t>(side, 10 - j);
            pieces.push_back(std::unique_ptr<Piece>(
                new Piece{i, j, rows, cols, RuleDriverOf<T>(rule, {MatrixOf<T>(rows, cols)}, false, use)}));
          }
        for (const Matrix64& g : gradients) {
          whole.step({cast<T>(g)});
          MatrixOf<T> together(7, 10);
          for (const auto& piece : pieces) {
            MatrixOf<T> part(piece->rows, piece->cols);
            for (int64_t i = 0; i < part.rows; ++i)
              for (int64_t j = 0; j < part.cols; ++j)
                part(i, j) = static_cast<T>(g(piece->row + i, piece->col + j));
            piece->driver.step({part});
            const MatrixOf<T> u = piece->driver.direction();
            for (int64_t i = 0; i < part.rows; ++i)
              for (int64_t j = 0; j < part.cols; ++j) together(piece->row + i, piece->col + j) = u(i, j);
          }
          EXPECT_LT(deviation(whole.direction(), together), number.tolerance);
        }
      }
  });
}

TEST(Shampoo, RootsAreRenewedEveryFreqSteps) {
  const auto gradients = normals(5, 4, 4, 60);
  const auto rare = directions<double>("shampoo:graft=none,momentum=0,freq=3", gradients, on_cpu),
             often = directions<double>("shampoo:graft=none,momentum=0,freq=1", gradients, on_cpu);
  for (const size_t t : {0, 3}) EXPECT_LT(deviation(rare[t], often[t]), 1e-12) << t;
  for (const size_t t : {1, 2, 4}) EXPECT_GT(deviation(rare[t], often[t]), 1e-3) << t;
}

TEST(Shampoo, AccumulationAndGraftingChangeSizes) {
  for (const UseDevice use : both_devices()) {
    const Matrix64 g = normal(5, 8, 1);
    // The sum grows, so that steps shrink like t^-1/2; the corrected mean stays.
    const auto sums =
        directions<double>("shampoo:accumulate=sum,momentum=0,graft=none,freq=1,eps=0", {g, g, g, g}, use);
    EXPECT_LT(deviation(scaled(sums[3], 2), sums[0]), 1e-9);
    const auto means = directions<double>("shampoo:momentum=0.9,graft=none,freq=1,eps=0", {g, g, g}, use);
    EXPECT_LT(deviation(means[2], means[0]), 1e-9);
    EXPECT_NEAR(inner(means[0], means[0]), 5, 1e-8);  // U V^T
    const auto sgd = directions<double>("shampoo:graft=sgd", {g}, use);
    EXPECT_NEAR(inner(sgd[0], sgd[0]) / inner(g, g), 1, 1e-9);
    EXPECT_LT(deviation(scaled(sgd[0], 1 / size_of(sgd[0])), scaled(means[0], 1 / std::sqrt(5.0))), 1e-6);
  }
}

TEST(Shampoo, SpecialGradients) {
  in_both_dtypes([](auto number, UseDevice use) {
    using T = typename decltype(number)::type;
    for (const char* rule :
         {"shampoo", "shampoo:graft=none", "shampoo:eps=0,freq=1", "shampoo:accumulate=none,graft=none",
          "shampoo:root=newton", "shampoo:accumulate=none,root=newton", "shampoo:block=3", "oneside",
          "oneside:block=3", "soap", "soap:freq=1,sides=one"}) {
      SCOPED_TRACE(rule);
      const auto run = [&](const Matrix64& g, const std::string& keys = "") {
        return directions<T>(rule + keys, {g, g, g}, use);
      };
      const bool rotates = std::string_view(rule).starts_with("soap"), has_keys = std::strchr(rule, ':');
      for (const auto& u : run(Matrix64(4, 7)))
        for (const T x : u.data) EXPECT_EQ(x, 0);
      for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{6, 4}, {1, 5}, {5, 1}, {1, 1}})
        for (const double size : {1.0, 0x1p-66, 0x1p30}) {
          SCOPED_TRACE(testing::Message() << rows << " x " << cols << " of size " << size);
          for (const Matrix64& g : {of_rank(1, rows, cols, 7), normal(rows, cols, 8)}) {
            const Matrix64 x = scaled(g, size);
            const auto list = run(x);
            for (const auto& u : list)
              for (const T value : u.data) ASSERT_TRUE(std::isfinite(value));
            // Downhill, for soap only with an eps above rounding (rule_soap.cpp).
            const std::string eps = fmt::format("{}eps={:g}", has_keys ? "," : ":", 1e-5 * size);
            EXPECT_GT(inner(cast<T>(g), rotates ? run(x, eps)[2] : list[2]), 0);
          }
        }
      for (const double bad : {double{NAN}, double{INFINITY}}) {
        Matrix64 g = normal(4, 7, 9);
        g(2, 3) = bad;
        for (const auto& u : directions<T>(rule, {g, normal(4, 7, 10)}, use)) {
          EXPECT_FALSE(std::isfinite(u(2, 3)));  // also at the next step: it is in the state
          if (std::string(rule).find("accumulate=none") != std::string::npos) break;
        }
      }
    }
  });
}

TEST(Shampoo, ManyBlocksInTheScratchThatIsPublished) {
  for (const UseDevice use : both_devices())
    for (const std::string rule :
         {"shampoo:block=16,freq=1", "shampoo:root=newton,graft=sgd", "oneside:block=20",
          "shampoo:accumulate=none,graft=none", "soap:freq=1", "soap:max_side=24"}) {
      SCOPED_TRACE(rule);
      std::vector<Matrix> weights(3, Matrix(40, 24)), gradients;
      for (uint32_t i = 0; i < 3; ++i) gradients.push_back(random_matrix(40, 24, i));
      RuleDriver together(rule, weights, false, use);  // reserves no more than that
      for (int t = 0; t < 2; ++t) together.step(gradients, t == 1 ? 5 : 0);
      for (int64_t i = 0; i < 3; ++i) {
        RuleDriver alone(rule, {weights[0]}, false, use);
        for (int t = 0; t < 2; ++t) alone.step({gradients[static_cast<size_t>(i)]});
        EXPECT_LT(deviation(together.direction(i), alone.direction()), 1e-5);
      }
    }
}

TEST(Soap, SameAsAnOracle) {
  in_both_dtypes([](auto number, UseDevice use) {
    using T = typename decltype(number)::type;
    const double tolerance = 30 * number.tolerance;
    const auto check = [&](const std::string& rule, const SoapOracle& oracle,
                           const std::vector<Matrix64>& gradients) {
      expect_oracle<T>(rule, oracle, gradients, use, tolerance);
    };
    // Square, or the smaller side alone: the first gradient decides the whole basis.
    check("soap:freq=3", {.freq = 3}, normals(8, 5, 5, 70));
    check("soap:freq=1,beta=0.7,beta1=0.5,beta2=0.8,eps=1e-3",
          {.beta = 0.7, .beta1 = 0.5, .beta2 = 0.8, .eps = 1e-3, .freq = 1}, normals(5, 5, 5, 71));
    check("soap:freq=2,sides=one", {.right = false, .freq = 2}, normals(5, 4, 9, 72));
    check("soap:freq=2,max_side=4", {.left = false, .freq = 2}, normals(5, 9, 4, 73));
    check("soap:beta1=0,beta2=0,sides=one", {.beta1 = 0, .beta2 = 0, .left = false}, normals(3, 6, 5, 74));
  });
}

// Rotating the gradients rotates the directions; Adam's depend on the coordinates.
TEST(Soap, KnowsNoCoordinates) {
  for (const UseDevice use : both_devices()) {
    const Matrix64 P = orthonormal(normal(6, 6, 1)), Q = orthonormal(normal(6, 6, 2));
    const auto gradients = normals(5, 6, 6, 80);
    std::vector<Matrix64> rotated;
    for (const Matrix64& g : gradients) rotated.push_back(product(product(P, g), Q));
    const auto both = [&](const std::string& rule) {
      const Matrix64 want = product(product(P, directions<double>(rule, gradients, use)[4]), Q);
      return deviation(directions<double>(rule, rotated, use)[4], want);
    };
    EXPECT_LT(both("soap:freq=2"), 1e-8);
    EXPECT_LT(both("shampoo:graft=none"), 1e-8);
    EXPECT_GT(both("adam"), 0.1);
  }
}

// In a basis of unit vectors it is Adam, a step late.
TEST(Soap, IsAdamOnDiagonalGradients) {
  in_both_dtypes([](auto number, UseDevice use) {
    using T = typename decltype(number)::type;
    std::vector<Matrix64> gradients(6, Matrix64(5, 5));
    for (size_t t = 0; t < gradients.size(); ++t)
      for (int64_t i = 0; i < 5; ++i)
        gradients[t](i, i) = normal(1, 5, 30 + static_cast<uint32_t>(t)).data[static_cast<size_t>(i)];
    const std::vector<Matrix64> later(gradients.begin() + 1, gradients.end());
    const auto want = directions<T>("adam:beta1=0.95,beta2=0.95,eps=1e-3", later, use);
    for (const char* rule : {"soap:eps=1e-3,freq=1", "soap:eps=1e-3,freq=2", "soap:eps=1e-3,max_side=1"}) {
      auto got = directions<T>(rule, gradients, use);
      for (const T x : got[0].data) EXPECT_EQ(x, 0);
      got.erase(got.begin());
      expect_same(got, want, number.tolerance / 10);
    }
    const auto any = normals(4, 3, 6, 40);  // no side is rotated
    auto got = directions<T>("soap:max_side=2", any, use);
    got.erase(got.begin());
    expect_same(got, directions<T>("adam:beta1=0.95,beta2=0.95", {any.begin() + 1, any.end()}, use),
                number.tolerance / 10);
  });
}

TEST(Shampoo, Messages) {
  EXPECT_NE(rule_message("shampoo:root=newton,exponent=-0.3").find("root=eigen"), std::string::npos);
  EXPECT_EQ(rule_message("shampoo:root=newton,exponent=-0.5,steps=20"), "");
  EXPECT_NE(rule_message("shampoo:steps=20"), "");                // of newton
  EXPECT_NE(rule_message("shampoo:accumulate=none,freq=2"), "");  // nothing to keep
  EXPECT_NE(rule_message("shampoo:graft=none,graft_beta2=0.9"), "");
  EXPECT_NE(rule_message("shampoo:exponent=0.25"), "");
  EXPECT_NE(rule_message("soap:freq=0"), "");
  EXPECT_EQ(make_rule("--hidden", "oneside")->weight_decay(), 0.1);
  EXPECT_EQ(make_rule("--hidden", "oneside:wd=0")->weight_decay(), 0);
  EXPECT_EQ(make_rule("--hidden", "shampoo")->describe(), "l2-l2, smoothed by L and R");
}

TEST(Pieces, CoverTheMatrixOnce) {
  in_both_dtypes([](auto number, UseDevice use) {
    using T = typename decltype(number)::type;
    Context ctx;
    use(ctx);
    for (const auto& [rows, cols, side] :
         {std::tuple<int64_t, int64_t, int64_t>{7, 10, 3}, {8, 8, 4}, {1, 9, 4}, {5, 150, 130}, {3, 4, 0}}) {
      const MatrixOf<T> x = cast<T>(normal(rows, cols, 5));
      ThereOf<T> from(ctx, x), to(ctx, MatrixOf<T>(rows, cols)), parts(ctx, MatrixOf<T>(rows, cols));
      int64_t covered = 0;
      for (const PieceGrid& grid : pieces_of({rows, cols}, side)) {
        EXPECT_TRUE(side == 0 || std::max(grid.rows, grid.cols) <= side);
        const int64_t size = grid.count() * grid.rows * grid.cols;
        const Tensor part =
            parts.tensor().view({rows * cols}).slice(0, size).view({grid.count(), grid.rows, grid.cols});
        cut_pieces(ctx, {.parts = part, .whole = from.tensor(), .grid = grid});
        const MatrixOf<T> here = download<T>(ctx, part);
        for (int64_t k = 0; k < size; ++k) {
          const int64_t c = k % grid.cols, r = k / grid.cols % grid.rows, piece = k / (grid.rows * grid.cols);
          EXPECT_EQ(here.data[static_cast<size_t>(k)],
                    x(grid.row + piece / grid.J * grid.rows + r, grid.col + piece % grid.J * grid.cols + c));
        }
        paste_pieces(ctx, {.parts = part, .whole = to.tensor(), .grid = grid});
        covered += size;
      }
      EXPECT_EQ(covered, rows * cols);
      EXPECT_EQ(to.here().data, x.data);
    }
    ThereOf<T> small(ctx, MatrixOf<T>(2, 2));
    EXPECT_THROW(
        cut_pieces(
            ctx, {.parts = small.batch(), .whole = small.tensor(), .grid = {.row = 1, .rows = 2, .cols = 2}}),
        ShapeError);
  });
}
