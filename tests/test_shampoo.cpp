// shampoo and oneside on the CPU and on a GPU or in the executor, by the same bodies: expected numbers, an
// oracle in plain float64 loops, and what must hold whatever the numbers are, of soap, too.
#include <gtest/gtest.h>

#include <fmt/format.h>

#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>

#include "tests/shampoo_fixture.h"

namespace {
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
            .step({as<T>(gradients[0])}, /*sharpness=*/2);
    double nuclear = 0;
    for (const double v : jacobi(product(gradients[0], gradients[0].transposed())).values)
      nuclear += std::sqrt(v);
    EXPECT_NEAR(dual / (nuclear / 2), 1, number.tolerance);
    // Shampoo^2 is another thing: U S^-1 V^T, which changes inversely to the gradient.
    const auto squared = directions<T>("shampoo:accumulate=none,momentum=0,graft=none,exponent=-0.5",
                                       {gradients[0], scaled(gradients[0], 4)}, use);
    const Matrix64 inverse =
        product(power_of(product(gradients[0], gradients[0].transposed()), -1, 0), gradients[0]);
    EXPECT_LT(deviation(squared[0], as<T>(inverse)), 10 * number.tolerance);
    EXPECT_LT(deviation(squared[1], as<T>(scaled(inverse, 0.25))), 10 * number.tolerance);
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
          whole.step({as<T>(g)});
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

// What a side costs is its factor: one that has none may be as long as it likes.
TEST(Shampoo, OneSideIsCutByTheSideThatHasAFactor) {
  for (const UseDevice use : both_devices())
    for (const auto& shape : {std::pair<int64_t, int64_t>{5, 14}, {14, 5}}) {
      const int64_t rows = shape.first, cols = shape.second;
      SCOPED_TRACE(testing::Message() << rows << " x " << cols);
      const auto run = [&](const char* rule) {
        return directions<double>(rule, normals(3, rows, cols, 61), use);
      };
      const auto whole = run("oneside:block=0"), fits = run("oneside:block=5"), cut = run("oneside:block=4");
      for (size_t t = 0; t < whole.size(); ++t) {
        EXPECT_EQ(fits[t].data, whole[t].data) << t;
        EXPECT_GT(deviation(cut[t], whole[t]), 1e-3) << t;
      }
      EXPECT_GT(deviation(run("shampoo:block=5")[2], run("shampoo:block=0")[2]), 1e-3);  // has both factors
    }
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
            EXPECT_GT(inner(as<T>(g), rotates ? run(x, eps)[2] : list[2]), 0);
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

// Products of other batches may add in another order, so each rule has an eps above rounding, and soap with
// both of its bases a gradient of full rank.
TEST(Shampoo, ManyBlocksInTheScratchThatIsPublished) {
  for (const UseDevice use : both_devices())
    for (const std::string rule : {"shampoo:block=16,freq=1,eps=0.1", "shampoo:root=newton,graft=sgd,eps=0.1",
                                   "oneside:block=20,eps=0.1", "shampoo:accumulate=none,graft=none",
                                   "soap:freq=1,eps=10", "soap:max_side=24"}) {
      SCOPED_TRACE(rule);
      const int64_t rows = rule.find("soap:freq=1") == 0 ? 24 : 40;
      std::vector<Matrix> weights(3, Matrix(rows, 24)), gradients;
      for (uint32_t i = 0; i < 3; ++i) gradients.push_back(random_matrix(rows, 24, i));
      RuleDriver together(rule, weights, false, use);  // reserves no more than that
      for (int t = 0; t < 2; ++t) together.step(gradients, t == 1 ? 5 : 0);
      for (int64_t i = 0; i < 3; ++i) {
        RuleDriver alone(rule, {weights[0]}, false, use);
        for (int t = 0; t < 2; ++t) alone.step({gradients[static_cast<size_t>(i)]});
        EXPECT_LT(deviation(together.direction(i), alone.direction()), 1e-5);
      }
    }
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
