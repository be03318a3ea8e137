// Prodigy in its three orderings: expected trajectories, what they have in common, and the package's options
// against its formulas written down once more. Both devices, both precisions.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "tests/optim_fixture.h"

namespace {
std::vector<UseDevice> devices() {
  std::vector<UseDevice> list{on_cpu};
  if constexpr (kHaveGpu) list.push_back([](Context& ctx) { use_gpu(ctx, 0, DType::f32); });
  return list;
}

/// Six gradients that are roughly aligned, so that eta grows.
template <typename T>
MatrixOf<T> aligned_gradient(size_t t) {
  return MatrixOf<T>(optim_golden().at("G_prodigy").at(t));
}
template <typename T>
MatrixOf<T> start() {
  return MatrixOf<T>(optim_golden().at("W0"));
}

constexpr std::pair<const char*, const char*> kGolden[] = {
    {"prodigy_no_ema", "prodigy:variant=no-ema,eta0=1e-2"},
    {"prodigy_ema_paper", "prodigy:eta0=1e-2,beta1=0.9,beta2=0.999"},
    {"prodigy_impl", "prodigy:variant=package,eta0=1e-2,wd=0.01"},
};

template <typename T>
void check_golden(UseDevice use, double tolerance) {
  for (const auto& [name, rule] : kGolden) {
    SCOPED_TRACE(name);
    const nlohmann::json& expected = optim_golden().at("optimizers").at(name);
    RuleDriverOf<T> driver(rule, {start<T>()}, /*transposed=*/false, use);
    RuleDriverOf<T> stored(rule, {start<T>().transposed()}, /*transposed=*/true, use);
    for (size_t t = 0; t < 6; ++t) {
      driver.step({aligned_gradient<T>(t)});
      stored.step({aligned_gradient<T>(t).transposed()});
      const MatrixOf<T> want(expected.at("W").at(t));
      EXPECT_LT(deviation(driver.weight(), want), tolerance) << "step " << t;
      EXPECT_LT(deviation(stored.weight().transposed(), want), tolerance) << "stored, step " << t;
      EXPECT_NEAR(driver.eta() / expected.at("eta").at(t + 1).get<double>(), 1, tolerance) << "step " << t;
    }
  }
}

/// The weights and the velocities of six steps.
struct Path {
  std::vector<Matrix64> weights;
  std::vector<double> etas;
};
Path path_of(const std::string& rule, UseDevice use = on_cpu, double loss_scale = 1,
             double weight_scale = 1) {
  RuleDriverOf<double> driver(rule, {scaled(start<double>(), weight_scale)}, /*transposed=*/false, use);
  Path path;
  for (size_t t = 0; t < 6; ++t) {
    driver.step({scaled(aligned_gradient<double>(t), loss_scale)});
    path.weights.push_back(driver.weight());
    path.etas.push_back(driver.eta());
  }
  return path;
}
void expect_near(const Path& a, const Path& b, double tolerance) {
  for (size_t t = 0; t < a.etas.size(); ++t) {
    EXPECT_NEAR(a.etas[t] / b.etas[t], 1, tolerance) << t;
    EXPECT_LT(deviation(a.weights[t], b.weights[t]), tolerance) << t;
  }
}

/// The package's options, in its order of operations and without units of eta0.
struct Package {
  double eta0 = 0.01, lr = 1, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, wd = 0, growth = INFINITY,
         coefficient = 1;
  bool bias_correction = false, safeguard = false;
};
Path package_path(const Package& p) {
  Matrix64 w = start<double>();
  const Matrix64 w0 = w;
  const size_t n = w.data.size();
  std::vector<double> m(n), v(n), s(n);
  double d = p.eta0, most = p.eta0, numerator = 0;
  const double b3 = std::sqrt(p.beta2);
  Path path;
  for (size_t t = 0; t < 6; ++t) {
    const Matrix64 g = aligned_gradient<double>(t);
    const double k = static_cast<double>(t + 1);
    const double correction =
        p.bias_correction ? std::sqrt(1 - std::pow(p.beta2, k)) / (1 - std::pow(p.beta1, k)) : 1;
    const double dlr = d * p.lr * correction, old = d;
    numerator = b3 * numerator + d / p.eta0 * dlr * (inner(g, w0) - inner(g, w));
    double denominator = 0;
    for (size_t i = 0; i < n; ++i) {
      m[i] = p.beta1 * m[i] + (1 - p.beta1) * d * g.data[i];
      v[i] = p.beta2 * v[i] + (1 - p.beta2) * d * d * g.data[i] * g.data[i];
      s[i] = b3 * s[i] + d / p.eta0 * (p.safeguard ? d : dlr) * g.data[i];
      denominator += std::fabs(s[i]);
    }
    const double found = p.coefficient * numerator / denominator;
    if (d == p.eta0) d = std::max(d, found);
    most = std::max(most, found);
    d = std::min(most, d * p.growth);
    for (size_t i = 0; i < n; ++i) {
      const double first = p.beta1 == 0 ? m[i] / old * d : m[i];  // it then multiplies g by the new d
      w.data[i] = (1 - p.wd * old * p.lr) * w.data[i] - dlr * first / (std::sqrt(v[i]) + d * p.eps);
    }
    path.weights.push_back(w);
    path.etas.push_back(d);
  }
  return path;
}
}  // namespace

TEST(Prodigy, ExpectedTrajectories) {
  for (const UseDevice use : devices()) {
    check_golden<float>(use, 2e-5);
    check_golden<double>(use, 1e-9);
  }
}

TEST(Prodigy, ThePackagesOptions) {
  const std::string rule = "prodigy:variant=package,eta0=0.01";
  for (const UseDevice use : devices()) {
    const auto check = [&](const std::string& keys, const Package& p) {
      SCOPED_TRACE(keys);
      expect_near(path_of(rule + keys, use), package_path(p), 1e-9);
    };
    check("", {});
    check(",wd=0.3,lr=0.5", {.lr = 0.5, .wd = 0.3});
    check(",growth=1.5", {.growth = 1.5});
    check(",coefficient=0.7", {.coefficient = 0.7});
    check(",bias_correction=1", {.bias_correction = true});
    check(",safeguard_warmup=1,lr=0.5", {.lr = 0.5, .safeguard = true});
    check(",beta1=0,eps=0.01", {.beta1 = 0, .eps = 0.01});
    check(",beta2=0", {.beta2 = 0});
    check(",beta1=0,beta2=0,eps=0.5", {.beta1 = 0, .beta2 = 0, .eps = 0.5});
  }
}

// Without eps, corrections and limits the package computes what the paper prints.
TEST(Prodigy, OrderingsAgreeWhereTheyShould) {
  expect_near(path_of("prodigy:variant=package,eta0=0.01,eps=0"), path_of("prodigy:eta0=0.01"), 1e-12);
  const Path paper = path_of("prodigy:eta0=0.01,beta1=0,beta2=0"),
             bare = path_of("prodigy:variant=no-ema,eta0=0.01");
  EXPECT_EQ(paper.etas, bare.etas);
  for (size_t t = 0; t < 6; ++t) EXPECT_EQ(paper.weights[t].data, bare.weights[t].data);
}

// No eps: the loss's scale does not matter; weights in other units make eta one in those units.
TEST(Prodigy, ScaleEquivariance) {
  for (const std::string rule : {"prodigy:variant=no-ema", "prodigy", "prodigy:variant=package,eps=0"}) {
    SCOPED_TRACE(rule);
    const std::string keys = rule.find(':') == std::string::npos ? ":eta0=" : ",eta0=";
    const Path plain = path_of(rule + keys + "0.01");
    for (const double c : {1e-12, 1e3}) expect_near(path_of(rule + keys + "0.01", on_cpu, c), plain, 1e-10);
    Path wide = path_of(rule + keys + "0.04", on_cpu, 1, 4);
    for (double& eta : wide.etas) eta /= 4;
    for (Matrix64& w : wide.weights) w = scaled(w, 0.25);
    expect_near(wide, plain, 1e-10);
  }
}

// Equations 28-29 are sign descent with the escape velocity: bit for bit, on a whole model.
TEST(Prodigy, WithoutAveragesIsSignWithTheEscapeVelocity) {
  for (const UseDevice use : devices()) {
    OptimizerOptions sign = everywhere("sign", "sign");
    sign.escape = parse_escape("--escape", "1e-3");
    SmallModel expected(sign, use),
        bare(everywhere("prodigy:variant=no-ema,eta0=1e-3", "prodigy:variant=no-ema,eta0=1e-3"), use),
        paper(everywhere("prodigy:eta0=1e-3,beta1=0,beta2=0", "prodigy:eta0=1e-3,beta1=0,beta2=0"), use);
    const auto eta_of = [](SmallModel& model, int64_t t) {
      model.set_gradients(7);  // the same at every step, so that eta grows
      model.optimizer.step(t, 20);
      return model.optimizer.report().eta;
    };
    double eta = 0;
    for (int64_t t = 0; t < 6; ++t) {
      eta = eta_of(expected, t);
      EXPECT_EQ(eta, eta_of(bare, t));
      EXPECT_EQ(eta, eta_of(paper, t));
      EXPECT_EQ(expected.weights(), bare.weights());
      EXPECT_EQ(expected.weights(), paper.weights());
    }
    EXPECT_NEAR(eta / 5e-3, 1, 1e-3);  // Fibonacci: 1, 1, 1, 2, 3, 5
  }
}

TEST(Prodigy, AGradientThatIsNotFiniteChangesNothing) {
  for (const UseDevice use : devices()) {
    for (const char* rule : {"prodigy", "prodigy:variant=package", "prodigy:variant=no-ema"}) {
      SmallModel model(everywhere(rule, rule), use);
      for (int64_t t = 0; t < 3; ++t) model.step(t);
      const auto weights = model.weights(), state = model.state();
      model.set_gradients(3);
      const Tensor& poisoned = model.table.at("h.1.mlp.c_fc.weight").grad;
      Matrix g = download(model.ctx, poisoned);
      g.data[3] = std::nanf("");
      upload(model.ctx, poisoned, g);
      model.optimizer.step(3, 20);
      EXPECT_THROW(model.optimizer.report(), RunError);
      EXPECT_EQ(model.weights(), weights);
      EXPECT_EQ(model.state(), state);
    }
  }
}

TEST(Prodigy, ZeroGradientsMoveNothing) {
  for (const char* rule : {"prodigy", "prodigy:variant=package", "prodigy:variant=no-ema"}) {
    RuleDriver driver(rule, {random_matrix(3, 4, 1)});
    for (int t = 0; t < 3; ++t) driver.step({Matrix(3, 4)});
    EXPECT_EQ(driver.weight().data, random_matrix(3, 4, 1).data) << rule;
    EXPECT_EQ(driver.eta(), 1e-6) << rule;
  }
}

// eta begins at 1e-6 and stands squared in v and s: gradients as small as training has must survive.
TEST(Prodigy, SmallNumbersSurvive) {
  for (const float size : {1e-9f, 1e6f}) {
    RuleDriver driver("prodigy", {Matrix(2, 3)});
    const Matrix g = random_matrix(2, 3, 5, size);
    for (int t = 0; t < 30; ++t) driver.step({g});
    EXPECT_GT(driver.eta(), 1e-4) << size;
  }
}

TEST(Prodigy, Keys) {
  const auto message = [](const std::string& rule) {
    try {
      make_rule("--hidden", rule);
    } catch (const UsageError& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(message("prodigy:variant=package,growth=2,coefficient=0.5,safeguard_warmup=1"), "");
  EXPECT_NE(message("prodigy:variant=no-ema,beta1=0.9").find("beta1"), std::string::npos);
  EXPECT_NE(message("prodigy:growth=2").find("growth"), std::string::npos);
  EXPECT_NE(message("prodigy:variant=ema").find("package"), std::string::npos);
  OptimizerOptions both = recipe_options("prodigy");
  both.escape = EscapeOptions{};
  EXPECT_THROW(SmallModel{both}, UsageError);
  OptimizerOptions two = recipe_options("prodigy");
  two.rules[Role::vector] = "prodigy:eta0=1e-5";  // one velocity for all
  EXPECT_THROW(SmallModel{two}, UsageError);
}
