// Rules on expected trajectories, the equalities between rules, what is special, and schedules.
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

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
