// The escape velocity under any modular norm: its two laws (golden ratio on a linear loss, never past the
// solution on a convex one) through the real optimizer, its symmetries, and that it is resumed.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>

#include "model/checkpoint.h"
#include "optim/norm.h"
#include "tests/optim_fixture.h"
#include "tests/temporary_folder.h"

namespace {
std::vector<UseDevice> devices() {
  std::vector<UseDevice> list{on_cpu};
  if constexpr (kHaveGpu) list.push_back([](Context& ctx) { use_gpu(ctx, 0, DType::f32); });
  return list;
}

/// Exact dual vectors for every norm, then modular norms of several, with sensitivities.
std::vector<OptimizerOptions> exact_norms() {
  std::vector<OptimizerOptions> list;
  for (const char* rule : {"sign", "sgd:normalize=1", "spectral:ns=svd", "spectral:ns=svd,scale=rms",
                           "colnorm", "rownorm", "steepest:norm=l1-l1", "steepest:norm=linf-linf"})
    list.push_back(everywhere(rule, "sgd:normalize=1"));
  list.push_back(everywhere("scion:alpha=1,ns=svd", "scion:alpha=1"));  // RMS->RMS, of vectors the RMS norm
  OptimizerOptions modular = everywhere("spectral:ns=svd,scale=rms", "sign");
  modular.rules[Role::embedding] = modular.rules[Role::position] = "colnorm";
  modular.overrides = {{"h.1.mlp.c_proj", "rownorm:s=3"}, {"h.0.attn.c_attn", "sgd:normalize=1"}};
  modular.sensitivities = {"wte=0.5", "h.0.*=2", "h.*.bias=4"};
  list.push_back(modular);
  modular.sensitivities = {"masses:embedding=1,hidden=3"};
  list.push_back(modular);
  return list;
}

/// A small model whose weights begin at 0, so that the way travelled has no rounding against large weights.
struct Probe : SmallModel {
  explicit Probe(OptimizerOptions options, const std::string& escape, UseDevice use = on_cpu)
      : SmallModel(with(std::move(options), escape), use, 6) {
    for (const Parameter& p : table) upload(ctx, p.value, Matrix(1, p.size()));
  }
  static OptimizerOptions with(OptimizerOptions options, const std::string& escape) {
    if (!escape.empty()) options.escape = parse_escape("--escape", escape);
    return options;
  }
  /// One step with gradients gradient(parameter, its weight).
  double step(int64_t t, const std::function<Matrix(const Parameter&, const Matrix&)>& gradient) {
    for (const Parameter& p : table) upload(ctx, p.grad, gradient(p, download(ctx, p.value)));
    optimizer.step(t, 100);
    return optimizer.report().eta;
  }
  /// max_l s_l ||x_l||_l over all blocks; x(parameter) has the parameter's size.
  double modular_norm(const std::function<Matrix(const Parameter&)>& x) {
    CpuContext host;
    double largest = 0;
    for (const RowStep& row : optimizer.last_steps()) {
      const Parameter& p = *row.parameter;
      Matrix values = x(p);
      for (int i = 0; i < p.matrices; ++i) {
        const int64_t n = p.size() / p.matrices;
        const Shape shape = p.is_matrix() ? Shape{p.shape[0] / p.matrices, p.shape[1]} : p.shape;
        const Tensor block(values.data.data() + i * n, shape);
        largest = std::max(largest, row.sensitivity * norm(host, row.norm, block, p.stored_transposed()));
      }
    }
    return largest;
  }
  double travelled() {
    return modular_norm([&](const Parameter& p) { return download(ctx, p.value); });
  }
};

Matrix some(const Parameter& p, uint32_t salt, float scale = 1) {
  uint32_t seed = salt;
  for (const char c : p.name) seed = 31 * seed + static_cast<unsigned char>(c);
  return random_matrix(1, p.size(), seed, scale);
}
/// The gradient of a linear loss.
Matrix slope(const Parameter& p, const Matrix&) {
  return some(p, 1);
}
/// The solution of a quadratic loss, and its gradient: curvatures between 0.25 and 4.
Matrix solution(const Parameter& p) {
  return some(p, 2, 0.1f);
}
Matrix quadratic(const Parameter& p, const Matrix& w) {
  Matrix g = solution(p);
  for (size_t i = 0; i < g.data.size(); ++i)
    g.data[i] = std::exp2(static_cast<float>(i % 5) - 2) * (w.data[i] - g.data[i]);
  return g;
}
/// Changes direction at every step.
Matrix noise(const Parameter& p, int64_t t) {
  return some(p, static_cast<uint32_t>(100 + t));
}
}  // namespace

// Expected numbers on a vector, where the norm is l1->linf: sign descent.
template <typename T>
void check_linear(UseDevice use, double tolerance) {
  const auto& expected = optim_golden().at("prodigy_linear_loss");
  const MatrixOf<T> g(nlohmann::json::array({expected.at("g")}));
  RuleDriverOf<T> driver("prodigy:variant=no-ema,eta0=1e-6", {MatrixOf<T>(1, g.cols)}, false, use);
  for (size_t t = 1; t <= 30; ++t) {
    driver.step({g});
    EXPECT_NEAR(driver.eta() / expected.at("eta").at(t).template get<double>(), 1, tolerance);
    EXPECT_NEAR(
        std::fabs(driver.weight().data[0]) / expected.at("max_abs_displacement").at(t).template get<double>(),
        1, tolerance);
  }
}
template <typename T>
void check_convex(UseDevice use, double tolerance) {
  const auto& expected = optim_golden().at("prodigy_convex");
  const MatrixOf<T> target(nlohmann::json::array({expected.at("wstar")})),
      curvature(nlohmann::json::array({expected.at("H_diag")}));
  RuleDriverOf<T> driver("prodigy:variant=no-ema,eta0=1e-5", {MatrixOf<T>(1, target.cols)}, false, use);
  for (size_t t = 0; t < 400; ++t) {
    MatrixOf<T> g = driver.weight();
    for (size_t i = 0; i < g.data.size(); ++i) g.data[i] = curvature.data[i] * (g.data[i] - target.data[i]);
    if (t < 40) {
      EXPECT_NEAR(driver.eta() / expected.at("eta_first_40").at(t).template get<double>(), 1, tolerance) << t;
    }
    driver.step({g});
    EXPECT_LE(driver.eta(), expected.at("linf_distance").template get<double>());
  }
  if (sizeof(T) == 8) {
    EXPECT_NEAR(driver.eta() / expected.at("eta_final").template get<double>(), 1, tolerance);
  }
}

TEST(Escape, ExpectedNumbers) {
  for (const UseDevice use : devices()) {
    check_linear<double>(use, 1e-9);
    check_linear<float>(use, 2e-5);
    check_convex<double>(use, 1e-9);
    check_convex<float>(use, 2e-5);
  }
}

// With exact dual vectors every tensor travels s_l ||W_l||_l = eta0 x 1, 2, 3, 5, 8 .. .
void check_golden_ratio(const OptimizerOptions& options, UseDevice use) {
  SCOPED_TRACE(options.rules.at(Role::hidden) + " " + options.rules.at(Role::embedding));
  Probe probe(options, "1e-6", use);
  double way = 0, expected = 1e-6, last = 0, before = 0;
  for (int64_t t = 0; t < 20; ++t) {
    before = last, last = probe.step(t, slope);
    EXPECT_NEAR(last / expected, 1, 2e-5) << t;
    expected = std::max(expected, way);  // the way before this step, which its gradient saw
    way += last;
    EXPECT_NEAR(probe.travelled() / way, 1, 2e-5) << t;
  }
  EXPECT_NEAR(last / before, (1 + std::sqrt(5)) / 2, 1e-4);
}

TEST(Escape, GoldenRatioOnALinearLossUnderAnyNorm) {
  for (const UseDevice use : devices())
    for (const OptimizerOptions& options : exact_norms())
      if (use == on_cpu || !options.overrides.empty())  // elsewhere the modular norms, which have all
        check_golden_ratio(options, use);
}

// The mean of gradients that do not change points where they do, and what is measured of it agrees with
// itself.
TEST(Escape, GoldenRatioOfSmoothedRules) {
  for (const UseDevice use : devices())
    for (const char* rule : {"signum", "lion", "adam:eps=0", "adam:eps=0,beta1=0",
                             "sgd:normalize=1,momentum=0.9", "steepest:norm=l1-linf,momentum=0.9,nesterov=1"})
      check_golden_ratio(everywhere(rule, rule), use);
}

// Never further than the solution, measured in the modular norm; and it does grow.
TEST(Escape, NeverPastTheSolutionOfAConvexLoss) {
  for (const OptimizerOptions& options : exact_norms()) {
    SCOPED_TRACE(options.rules.at(Role::hidden) + " " + options.rules.at(Role::embedding));
    Probe probe(options, "1e-4");
    double eta = 0;
    for (int64_t t = 0; t < 60; ++t) {
      const double now = probe.step(t, quadratic);
      EXPECT_GE(now, eta);
      eta = now;
      EXPECT_LE(eta, probe.modular_norm(solution) * (1 + 1e-5)) << t;
    }
    EXPECT_GT(eta, 1e-3);
  }
}

// Hoelder: the estimate is a part of the way travelled so far. Never shrinks, whatever the gradients.
TEST(Escape, NeverPastTheWayTravelledAndNeverShrinks) {
  for (const OptimizerOptions& options : exact_norms())
    for (const bool noisy : {true, false}) {
      SCOPED_TRACE(options.rules.at(Role::hidden) + " " + options.rules.at(Role::embedding));
      Probe probe(options, "1e-3");
      double limit = 1e-3, next_limit = 1e-3, eta = 0;
      for (int64_t t = 0; t < 15; ++t) {
        const double now = probe.step(t, [&](const Parameter& p, const Matrix& w) {
          Matrix g = slope(p, w);
          const Matrix other = noise(p, t);
          for (size_t i = 0; noisy && i < g.data.size(); ++i) g.data[i] += 3 * other.data[i];
          return g;
        });
        EXPECT_GE(now, eta);
        EXPECT_LE(now, limit * (1 + 1e-5)) << t;
        eta = now;
        limit = next_limit;  // the estimate is a step behind: this step's gradient saw the way before it
        next_limit = std::max(next_limit, probe.travelled());
      }
    }
}

// loss -> c loss changes nothing; weights in other units make eta one in those units. Powers of two: bits.
TEST(Escape, ScaleEquivariance) {
  for (const OptimizerOptions& options : exact_norms()) {
    SCOPED_TRACE(options.rules.at(Role::hidden) + " " + options.rules.at(Role::embedding));
    Probe plain(options, "0.0009765625"), loss(options, "0.0009765625"), units(options, "0.00390625");
    for (int64_t t = 0; t < 8; ++t) {
      const double eta = plain.step(t, quadratic);
      EXPECT_NEAR(eta / loss.step(t, [](const Parameter& p,
                                        const Matrix& w) { return scaled(quadratic(p, w), 1.0 / 1024); }),
                  1, 1e-5);
      EXPECT_NEAR(4 * eta /
                      units.step(t, [](const Parameter& p,
                                       const Matrix& w) { return quadratic(p, scaled(w, 0.25)); }),
                  1, 1e-5);
    }
    const auto a = plain.weights(), b = loss.weights(), c = units.weights();
    for (size_t i = 0; i < a.size(); ++i) {
      ASSERT_NEAR(a[i], b[i], 2e-6);
      ASSERT_NEAR(4 * a[i], c[i], 8e-6);
    }
  }
}

TEST(Escape, GrowthAndCoefficientLimitIt) {
  OptimizerOptions sign = everywhere("sign", "sign");
  Probe limited(sign, "1e-6:growth=1.25"), half(sign, "1e-6:coefficient=0.5");
  double last = 0;
  for (int64_t t = 0; t < 12; ++t) {
    const double eta = limited.step(t, slope);
    if (t > 3) {
      EXPECT_NEAR(eta / last, 1.25, 1e-5);
    }
    last = eta;
    half.step(t, slope);
  }
  // eta' = way / 2: the ratio solves x^2 = x + 1 / 2.
  const double before = half.step(12, slope);
  EXPECT_NEAR(half.step(13, slope) / before, (1 + std::sqrt(3)) / 2, 1e-4);
}

TEST(Escape, NothingComesFromNoGradientOrABadOne) {
  for (const UseDevice use : devices())
    for (const OptimizerOptions& options : {exact_norms().back(), recipe_options("prodigy")}) {
      Probe probe(options, options.rules.at(Role::hidden) == "prodigy" ? "" : "1e-3", use);
      const auto zero = [](const Parameter& p, const Matrix&) { return Matrix(1, p.size()); };
      const double first = probe.step(0, zero);
      EXPECT_EQ(probe.step(1, zero), first);
      EXPECT_EQ(probe.travelled(), 0);
      for (int64_t t = 2; t < 6; ++t) probe.step(t, slope);
      const auto weights = probe.weights(), state = probe.state();
      const auto poisoned = [](const Parameter& p, const Matrix& w) {
        Matrix g = slope(p, w);
        if (p.name == "h.0.mlp.c_fc.weight") g.data[1] = std::nanf("");
        return g;
      };
      EXPECT_THROW(probe.step(6, poisoned), RunError);
      EXPECT_EQ(probe.weights(), weights);
      EXPECT_EQ(probe.state(), state);
      EXPECT_GT(probe.step(6, slope), first);
    }
}

// The anchor, the velocity and every rule's state survive a checkpoint, bit for bit.
TEST(Escape, ResumesBitForBit) {
  const TemporaryFolder folder;
  std::vector<std::pair<OptimizerOptions, std::string>> cases{{exact_norms().back(), "1e-3:growth=1.5"},
                                                              {recipe_options("prodigy"), ""}};
  for (const char* rule : {"prodigy:variant=package", "prodigy:variant=no-ema", "prodigy:beta1=0"})
    cases.emplace_back(everywhere(rule, rule), "");
  for (const UseDevice use : devices())
    for (const auto& [options, escape] : cases) {
      SCOPED_TRACE(options.rules.at(Role::hidden));
      Probe whole(options, escape, use), resumed(options, escape, use);
      for (int64_t t = 0; t < 4; ++t) whole.step(t, slope);
      write_safetensors(folder.path("optimizer.safetensors"), whole.optimizer.state(), {}, Existing::replace);
      load_optimizer(folder.path(""), resumed.optimizer.state());
      for (const Parameter& p : whole.table)
        upload(resumed.ctx, resumed.table.at(p.name).value, download(whole.ctx, p.value));
      EXPECT_EQ(whole.state(), resumed.state());
      for (int64_t t = 4; t < 7; ++t) EXPECT_EQ(whole.step(t, slope), resumed.step(t, slope));
      EXPECT_EQ(whole.weights(), resumed.weights());
      EXPECT_EQ(whole.state(), resumed.state());
    }
}
