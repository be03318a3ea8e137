// Rules on expected trajectories, the equalities between rules, schedules, and the whole optimizer.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "optim/modular.h"
#include "optim/svd.h"
#include "tests/optim_checks.h"

TEST(Rules, ExpectedTrajectories) {
  check_trajectories(on_cpu);
}

TEST(Rules, EveryExpectedTrajectoryIsARow) {
  std::set<std::string> rows;
  for (const Trajectory& row : trajectories()) rows.insert(row.name);
  for (const auto& [name, numbers] : optim_golden().at("optimizers").items()) {
    const bool elsewhere =
        name.starts_with("shampoo_") || name.starts_with("prodigy_");  // files of their own
    EXPECT_TRUE(rows.contains(name) || elsewhere) << name;
  }
}

TEST(Rules, Equalities) {
  check_equalities(on_cpu);
}

TEST(Rules, AdamOfZeroIsZero) {
  Matrix g(2, 2);
  g(0, 0) = 1e-25f;  // its square underflows
  g(0, 1) = -3;
  RuleDriver driver("adam:lr=1,beta1=0,beta2=0,eps=0", {Matrix(2, 2)});
  driver.step({g});
  EXPECT_EQ(driver.direction().data, (std::vector<float>{1, -1, 0, 0}));
  RuleDriver smoothed("adam:lr=1,eps=0", {Matrix(2, 2)});
  for (int t = 0; t < 3; ++t) smoothed.step({Matrix(2, 2)});
  EXPECT_EQ(smoothed.direction().data, (std::vector<float>{0, 0, 0, 0}));
}

TEST(Rules, NaNStaysVisible) {
  for (const RuleEntry& entry : rule_table()) {
    Matrix g = random_matrix(3, 4, 1);
    g(1, 1) = std::nanf("");
    RuleDriver driver(entry.name, {Matrix(3, 4)});
    driver.step({g});
    EXPECT_TRUE(std::isnan(driver.direction()(1, 1))) << entry.name;
  }
}

TEST(Rules, ScionMovesVectorsByTheirRms) {  // RMS->RMS of one column
  SmallModel model(everywhere("scion", "scion:alpha=1,lr=0.5,radius=4"));
  std::map<std::string, Matrix> before;
  for (const Parameter& p : model.table) before[p.name] = download(model.ctx, p.value);
  model.step(0);
  for (const Parameter& p : model.table) {
    if (p.is_matrix()) continue;
    double squares = 0;
    const Matrix after = download(model.ctx, p.value);
    for (size_t i = 0; i < after.data.size(); ++i)
      squares += std::pow(static_cast<double>(after.data[i]) - before[p.name].data[i], 2);
    EXPECT_NEAR(std::sqrt(squares / static_cast<double>(p.size())), 0.5 * 4, 1e-5) << p.name;
  }
}

TEST(Rules, CautiousDecay) {
  const Matrix w = random_matrix(5, 7, 1), g = random_matrix(5, 7, 2);
  RuleDriver plain("sgd:lr=0.1", {w}), cautious("sgd:lr=0.1,wd=0.5,cautious=1", {w});
  plain.step({g});
  cautious.step({g});
  int decayed = 0;
  for (size_t i = 0; i < w.data.size(); ++i) {
    const bool same_sign = g.data[i] * w.data[i] > 0;
    decayed += same_sign;
    if (same_sign)
      EXPECT_NEAR(cautious.weight().data[i], plain.weight().data[i] - 0.1 * 0.5 * w.data[i], 1e-6);
    else
      EXPECT_EQ(cautious.weight().data[i], plain.weight().data[i]);
  }
  EXPECT_GT(decayed, 5);
  EXPECT_LT(decayed, 30);
}

TEST(Rules, ZeroGradients) {
  check_zero_gradients(on_cpu);
}

TEST(Rules, ExtremeGradients) {
  check_extreme_gradients(on_cpu);
}

TEST(Rules, ConstrainedScionStaysInItsBall) {
  check_scion_stays_in_its_ball(on_cpu);
}

TEST(Rules, HyperballKeepsTheSize) {
  check_hyperball_keeps_the_size(on_cpu);
}

TEST(Rules, NorMuonEvensLines) {
  check_normuon_evens_lines(on_cpu);
}

// What the rank leaves out of the step stays in the momentum: M after = (1 - momentum) of it and the rest.
TEST(Rules, DionIsOfItsRankAndForgetsNothing) {
  const Matrix g = random_matrix(8, 12, 1);
  RuleDriver driver("dion:rank=2,momentum=0", {Matrix(8, 12)});
  driver.step({g});
  const Matrix u = driver.direction(), rest = driver.state_value("m");
  CpuContext ctx;
  std::vector<double> values(8);
  singular_values(ctx, There(ctx, u).tensor(), values);
  EXPECT_GT(values[1], 0.01);
  EXPECT_LT(values[2], 1e-6);
  EXPECT_LT(std::fabs(inner(rest, u)), 1e-5 * inner(g, u));  // momentum 0: all that u has seen is gone
  singular_values(ctx, There(ctx, rest).tensor(), values);
  EXPECT_GT(values[5], 0.01);  // and the other six directions are there
  EXPECT_LT(values[6], 1e-6);
  RuleDriver rested("dion:rank=2,momentum=0", {Matrix(8, 12)});
  rested.step({Matrix(8, 12)});  // nothing to remember: the next step begins anew
  rested.step({g});
  EXPECT_EQ(rested.direction().data, u.data);
}

TEST(Rules, DionOfFullRankBecomesMuon) {
  const Matrix g = random_matrix(4, 6, 3);
  RuleDriver dion("dion:rank=4", {Matrix(4, 6)}), muon("spectral:ns=svd,scale=rms", {Matrix(4, 6)});
  muon.step({g});
  dion.step({g});
  EXPECT_GT(deviation(dion.direction(), muon.direction()), 0.1);
  for (int t = 0; t < 200; ++t) dion.step({g});
  EXPECT_LT(deviation(dion.direction(), muon.direction()), 1e-4);
}

// The state, and so the result, of each block is its own: together as apart, in whatever batches.
TEST(Rules, BlocksDoNotMix) {
  for (const RuleEntry& entry : rule_table())
    for (const auto& [rows, cols] : {std::pair{12, 12}, {8, 32}, {33, 9}}) {
      if (make_rule("--hidden", entry.name)->escapes()) continue;  // one step size for all blocks
      std::vector<Matrix> weights;
      for (uint32_t i = 0; i < 5; ++i) weights.push_back(random_matrix(rows, cols, 10 + i));
      RuleDriver together(entry.name, weights);
      std::vector<std::unique_ptr<RuleDriver>> apart;
      for (const Matrix& w : weights)
        apart.push_back(std::make_unique<RuleDriver>(entry.name, std::vector{w}));
      for (uint32_t t = 0; t < 3; ++t) {
        std::vector<Matrix> gradients;
        for (uint32_t i = 0; i < 5; ++i) gradients.push_back(random_matrix(rows, cols, 100 * t + i));
        together.step(gradients);
        for (size_t i = 0; i < 5; ++i) apart[i]->step({gradients[i]});
      }
      for (size_t i = 0; i < 5; ++i)
        EXPECT_EQ(together.weight(static_cast<int64_t>(i)).data, apart[i]->weight().data) << entry.name;
    }
}

TEST(Rules, MoreBlocksThanFitInOneBatch) {  // 10 MB each: Muon takes three at a time, Newton-Schulz one
  constexpr size_t kBlocks = 5;
  std::vector<Matrix> weights(kBlocks, Matrix(64, 40000)), gradients;
  for (uint32_t i = 0; i < kBlocks; ++i) gradients.push_back(random_matrix(64, 40000, i));
  RuleDriver together("muon:steps=2", weights);
  together.step(gradients);
  for (size_t i = 0; i < kBlocks; ++i) {
    RuleDriver alone("muon:steps=2", {weights[i]});
    alone.step({gradients[i]});
    EXPECT_LT(deviation(together.weight(static_cast<int64_t>(i)), alone.weight()), 1e-4) << i;
  }
}

TEST(Rules, Messages) {
  EXPECT_NE(rule_message("moun").find("muon"), std::string::npos);
  EXPECT_NE(rule_message("muon:momentm=0.9").find("momentum"), std::string::npos);
  EXPECT_NE(rule_message("muon:ns=keller6").find("polar-express"), std::string::npos);
  EXPECT_NE(rule_message("muon:ns=svd,steps=3"), "");
  EXPECT_NE(rule_message("adam:beta1=1"), "");
  EXPECT_NE(rule_message("adam:lr=-1"), "");
  EXPECT_NE(rule_message("adam:lr=nan"), "");
  EXPECT_NE(rule_message("colnorm:norm=rms-linf"), "");
  EXPECT_NE(rule_message("scion:constrained=1,wd=0.1"), "");
  EXPECT_NE(rule_message("scion:constrained=1,cautious=1"), "");
  EXPECT_NE(rule_message("scion:norm=l2-l3").find("rms-rms"), std::string::npos);
  EXPECT_NE(rule_message("steepest:norm=l1-lq").find("with p in [1, inf], as in l1-l1.5"), std::string::npos);
  EXPECT_NE(rule_message("steepest:norm=l1-lp").find("put a number from 1 to inf for p: l1-l1.5"),
            std::string::npos);
  EXPECT_NE(rule_message("rownorm:norm=lp-linf").find("put a number from 1 to inf for p: l1.5-linf"),
            std::string::npos);
  EXPECT_NE(rule_message("normuon:axis=columns").find("auto"), std::string::npos);
  EXPECT_EQ(rule_message("adam:lr=0.1,wd=0.1,cautious=1,s=2,eps=0"), "");
  for (const RuleEntry& entry : rule_table()) EXPECT_EQ(rule_message(entry.name), "");
}

TEST(Schedule, Shapes) {
  const auto at = [](const char* text, int64_t step, int64_t total = 100) {
    return parse_schedule("--schedule", text).multiplier(step, total);
  };
  EXPECT_EQ(at("constant", 0), 1);
  EXPECT_EQ(at("constant", 99), 1);
  EXPECT_DOUBLE_EQ(at("constant:warmup=10", 0), 0.1);
  EXPECT_DOUBLE_EQ(at("constant:warmup=10", 9), 1);
  EXPECT_DOUBLE_EQ(at("linear", 0), 1);
  EXPECT_DOUBLE_EQ(at("linear", 99), 0.01);
  EXPECT_DOUBLE_EQ(at("linear:warmup=20,final=0.5", 20), 1);
  EXPECT_DOUBLE_EQ(at("linear:warmup=20,final=0.5", 60), 0.75);
  EXPECT_DOUBLE_EQ(at("cosine:final=0.1", 0), 1);
  EXPECT_NEAR(at("cosine:final=0.1", 50), 0.55, 1e-12);
  EXPECT_NEAR(at("cosine:final=0.1", 100), 0.1, 1e-12);
  EXPECT_NEAR(at("cosine:warmup=20", 40), 0.5 * (1 + std::cos(M_PI * 0.25)), 1e-12);
  EXPECT_DOUBLE_EQ(at("wsd:warmup=10,cooldown=0.4", 59), 1);
  EXPECT_DOUBLE_EQ(at("wsd:warmup=10,cooldown=0.4", 60), 1);
  EXPECT_DOUBLE_EQ(at("wsd:warmup=10,cooldown=0.4", 80), 0.5);
  EXPECT_DOUBLE_EQ(at("wsd:warmup=10,cooldown=0.4,final=0.2", 80), 0.6);
  EXPECT_DOUBLE_EQ(at("linear", 5, 0), 1);  // an open end never decays
  for (const char* kind : schedule_names())
    for (int64_t total : {1, 2, 7, 100})
      for (int64_t step = 0; step <= total; ++step) {
        const std::string text = std::string(kind) + ":warmup=3";
        EXPECT_GE(at(text.c_str(), step, total), 0);
        EXPECT_LE(at(text.c_str(), step, total), 1);
      }
  const Schedule wsd = parse_schedule("--schedule", "wsd:warmup=7,cooldown=0.3,final=0.25");
  EXPECT_EQ(parse_schedule("--schedule", wsd.str()).str(), wsd.str());
  EXPECT_THROW(parse_schedule("--schedule", "triangle"), UsageError);
  EXPECT_THROW(parse_schedule("--schedule", "cosine:cooldown=0.4"), UsageError);
  EXPECT_THROW(parse_schedule("--schedule", "linear:warmup=-1"), UsageError);
  EXPECT_THROW(parse_schedule("--schedule", "linear:final=2"), UsageError);
}

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
