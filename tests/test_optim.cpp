// The whole optimizer: its steps, its state, and what it tells.
#include <gtest/gtest.h>

#include <cstring>

#include "optim/modular.h"
#include "tests/optim_checks.h"

TEST(Optimizer, ResumeIsBitwise) {
  for (const OptimizerOptions& options : all_options()) {
    SmallModel whole(options);
    for (int64_t t = 0; t < 8; ++t) whole.step(t);

    SmallModel first(options);
    for (int64_t t = 0; t < 5; ++t) first.step(t);
    SmallModel second(options);
    for (size_t i = 0; i < first.table.rows().size(); ++i)
      std::memcpy(second.table.rows()[i].value.data, first.table.rows()[i].value.data,
                  static_cast<size_t>(first.table.rows()[i].value.bytes()));
    const auto from = first.optimizer.state(), to = second.optimizer.state();
    ASSERT_EQ(from.size(), to.size());
    for (size_t i = 0; i < from.size(); ++i) {
      EXPECT_EQ(from[i].name, to[i].name);
      std::memcpy(to[i].value.data, from[i].value.data, static_cast<size_t>(from[i].value.bytes()));
    }
    for (int64_t t = 5; t < 8; ++t) second.step(t);
    EXPECT_EQ(whole.weights(), second.weights()) << options.rules.at(Role::hidden);
  }
}

TEST(Optimizer, SameBitsRunToRun) {
  for (const OptimizerOptions& options : all_options()) {
    SmallModel a(options), b(options);
    for (int64_t t = 0; t < 3; ++t) {
      a.step(t);
      b.step(t);
    }
    EXPECT_EQ(a.weights(), b.weights());
  }
}

TEST(Optimizer, StateIsNamedAndCounted) {
  SmallModel model(recipe_options("muon"));
  int64_t bytes = 0;
  bool muon_state = false, adam_state = false;
  for (const NamedTensor& tensor : model.optimizer.state()) {
    bytes += tensor.value.bytes();
    if (tensor.name == "h.0.attn.c_attn.weight.m") {
      muon_state = true;
      EXPECT_EQ(tensor.value.shape, (Shape{48, 16}));
    }
    if (tensor.name == "wte.weight.v") {
      adam_state = true;
      EXPECT_EQ(tensor.value.shape, (Shape{37, 16}));  // no padding
    }
    EXPECT_NE(tensor.name, "h.0.attn.c_attn.weight.v");
  }
  EXPECT_TRUE(muon_state);
  EXPECT_TRUE(adam_state);
  EXPECT_GE(model.optimizer.state_bytes(), bytes);
  int64_t described = 0;
  for (const RowInfo& row : model.optimizer.describe()) {
    described += row.state_bytes;
    EXPECT_EQ(row.matrices, row.parameter.find("c_attn.weight") != std::string::npos ? 3 : 1);
    EXPECT_FALSE(row.norm.empty());
  }
  EXPECT_EQ(described, bytes);
}

TEST(Optimizer, FusedQkvIsThreeMatrices) {
  const std::string rule = "muon:lr=0.1,momentum=0.9,wd=0.1,ns=svd";
  OptimizerOptions options = recipe_options("muon");
  options.rules[Role::hidden] = rule;
  SmallModel model(options);
  const Parameter& qkv = model.table.at("h.1.attn.c_attn.weight");
  std::vector<Matrix> parts(3, Matrix(16, 16));
  const auto split = [&](const Tensor& fused) {
    for (int64_t i = 0; i < 3; ++i)
      std::copy_n(fused.f32() + i * 256, 256, parts[static_cast<size_t>(i)].data.begin());
    return parts;
  };
  RuleDriver driver(rule, split(qkv.value));
  for (int64_t t = 0; t < 3; ++t) {
    model.set_gradients(t);
    driver.step(split(qkv.grad));
    model.optimizer.step(t, 0);  // an open end: the schedule stays at 1
  }
  const auto fused = split(qkv.value);
  for (size_t i = 0; i < 3; ++i) EXPECT_LT(deviation(fused[i], driver.weight(static_cast<int64_t>(i))), 1e-6);
}

TEST(Optimizer, ClippingScalesGradients) {
  check_clipping(on_cpu);
}

TEST(Optimizer, NonFiniteGradientChangesNothing) {
  check_non_finite(on_cpu);
}

TEST(Optimizer, ReportsMayComeLate) {
  check_late_reports(on_cpu);
}

TEST(Optimizer, SharpnessIsProposition7) {
  OptimizerOptions options = everywhere("spectral:ns=svd,scale=rms,s=2", "sign:s=0.5");
  options.rules[Role::embedding] = "colnorm:s=3";
  options.rules[Role::position] = "sgd";
  options.sharpness = 50;
  SmallModel model(options);
  CpuContext ctx;
  const auto term = [&](const Parameter& p, const Tensor& x) {
    switch (p.role) {
      case Role::embedding:
        return ModularTerm{x, {NormKind::l1_rms}, 3, true};
      case Role::position:
        return ModularTerm{x, {NormKind::frobenius}, 1, true};
      case Role::vector:
        return ModularTerm{x, {NormKind::l1_linf}, 0.5, false};
      default:
        return ModularTerm{x, {NormKind::rms_rms}, 2, false};
    }
  };
  const auto terms = [&](bool of_gradients) {
    std::vector<ModularTerm> list;
    for (Parameter& p : model.table)
      for (int i = 0; i < p.matrices; ++i) {
        const Tensor& whole = of_gradients ? p.grad : p.value;
        const int64_t rows = whole.shape[0] / p.matrices;
        list.push_back(term(p, whole.slice(i * rows, rows)));
      }
    return list;
  };
  for (Parameter& p : model.table) std::fill_n(p.value.f32(), p.size(), 0.0f);  // so that W becomes dW
  model.set_gradients(0);
  const double eta = modular_dual_norm(ctx, terms(true)) / 50;
  model.optimizer.step(0, 0);
  const StepReport report = model.optimizer.report();
  EXPECT_NEAR(report.lr / eta, 1, 1e-6);
  for (const ModularTerm& t : terms(false))
    EXPECT_NEAR(t.s * norm(ctx, t.norm, t.x, t.transposed) / eta, 1,
                1e-5);  // every tensor at the same distance
}

TEST(Optimizer, PaddingStaysZero) {
  SmallModel model(recipe_options("adamw"));
  for (int64_t t = 0; t < 3; ++t) model.step(t);
  const Parameter& wte = model.table.at("wte.weight");
  const Tensor padded = wte.padded_value();
  for (int64_t i = wte.size(); i < padded.size(); ++i) ASSERT_EQ(padded.f32()[i], 0);
}

TEST(Optimizer, AbsentTokensDoNotMoveUnderColnorm) {
  OptimizerOptions options = recipe_options("modular");
  options.rules[Role::embedding] = "colnorm";
  SmallModel model(options);
  const Parameter& wte = model.table.at("wte.weight");
  const std::vector<float> row(wte.value.f32(), wte.value.f32() + 16);
  model.step(0);
  EXPECT_TRUE(std::equal(row.begin(), row.end(), wte.value.f32()));
}

TEST(Optimizer, ReportsTheHiddenRate) {
  OptimizerOptions options = recipe_options("adamw");
  options.schedule = parse_schedule("--schedule", "linear:warmup=4");
  options.rules[Role::hidden] = "adam:lr=0.5";
  SmallModel model(options);
  EXPECT_DOUBLE_EQ(model.step(1).lr, 0.25);
  EXPECT_DOUBLE_EQ(model.step(12).lr, 0.25);
}

TEST(Optimizer, BadAssignments) {
  CpuContext ctx;
  ParameterTable table(ModelConfig{.name = "small", .L = 1, .NH = 1, .C = 8, .positions = 4, .V = 11});
  const auto message = [&](const OptimizerOptions& options) -> std::string {
    try {
      Optimizer optimizer(ctx, table, options);
    } catch (const UsageError& error) {
      return error.what();
    }
    return "";
  };
  OptimizerOptions options = recipe_options("muon");
  EXPECT_EQ(message(options), "");
  options.rules[Role::vector] = "muon";
  EXPECT_NE(message(options).find("--vector"), std::string::npos);
  EXPECT_NE(message(options).find("ln_1.weight"), std::string::npos);
  options = recipe_options("muon");
  options.rules.erase(Role::hidden);
  EXPECT_NE(message(options).find("--hidden"), std::string::npos);
  options = recipe_options("muon");
  options.rules[Role::head] = "nonsense";  // even a role that this model does not have
  EXPECT_NE(message(options).find("--head"), std::string::npos);
  EXPECT_THROW(recipe_options("moun"), UsageError);
  for (const char* rule : {"prodigy", "adam:hyperball=1"}) {  // it is a pattern that gave the rule
    options = recipe_options("muon");
    options.overrides = {{"h.*.weight", rule}};
    options.sharpness = 1;
    EXPECT_NE(message(options).find(std::string("--set 'h.*.weight' ") + rule), std::string::npos) << rule;
  }
}

TEST(Optimizer, EveryRecipeLowersALinearLoss) {  // <G, W> with fixed G falls at every step
  for (const Recipe& recipe : recipe_table()) {
    SmallModel model(recipe_options(recipe.name));
    for (int64_t t = 0; t < 3; ++t) {
      const auto loss = [&] {
        double sum = 0;
        for (const Parameter& p : model.table) {
          uint32_t seed = static_cast<uint32_t>(p.name.size());
          const Matrix g = random_matrix(1, p.size(), seed);
          for (int64_t i = 0; i < p.size(); ++i)
            sum += static_cast<double>(g.data[static_cast<size_t>(i)]) * p.value.f32()[i];
        }
        return sum;
      };
      const double before = loss();
      for (Parameter& p : model.table) {
        const Matrix g = random_matrix(1, p.size(), static_cast<uint32_t>(p.name.size()));
        std::copy(g.data.begin(), g.data.end(), p.grad.f32());
      }
      model.optimizer.step(t, 20);
      EXPECT_LT(loss(), before) << recipe.name;
    }
  }
}
