// Rules on expected trajectories, the equalities between rules, schedules, and the whole optimizer.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "error.h"
#include "optim/modular.h"
#include "optim/optimizer.h"
#include "optim/recipe.h"
#include "optim/update.h"
#include "tests/optim_golden.h"

namespace {
using nlohmann::json;

/// A rule on matrices of one shape, outside any model; the step is the optimizer's.
class RuleDriver {
 public:
  RuleDriver(const std::string& text, const std::vector<Matrix>& weights, bool transposed = false)
      : rule_(make_rule("--hidden", text)), weights_(weights), grads_(weights) {
    const Shape shape{weights.at(0).rows, weights.at(0).cols};
    const auto specs = rule_->state(shape);
    state_.resize(weights.size() * specs.size());
    group_ = {.shape = shape, .transposed = transposed, .blocks = {}};
    for (size_t i = 0; i < weights.size(); ++i) {
      Block block{.weight = weights_[i].tensor(), .grad = grads_[i].tensor(), .state = {}};
      for (size_t k = 0; k < specs.size(); ++k) {
        auto& memory = state_[i * specs.size() + k];
        memory.assign(static_cast<size_t>(specs[k].shape.size()), 0);
        block.state.push_back({memory.data(), specs[k].shape});
      }
      group_.blocks.push_back(block);
    }
    ctx_.scratch.reserve(rule_->scratch_bytes(ctx_, group_));
  }
  /// One step; `sharpness` > 0 takes the step size from the dual norm. Returns that step size.
  double step(const std::vector<Matrix>& gradients, double sharpness = 0) {
    for (size_t i = 0; i < gradients.size(); ++i) grads_[i].data = gradients[i].data;  // keeps the memory
    const double dual =
        rule_->direction(ctx_, group_, {.t = ++t_, .grad_scale = 1, .want_dual = sharpness > 0});
    const double lr = sharpness > 0 ? dual / rule_->sensitivity() / sharpness : rule_->lr();
    for (Block& block : group_.blocks)
      apply_update(ctx_, {.w = block.weight,
                          .u = block.grad,
                          .step = static_cast<float>(lr / rule_->sensitivity()),
                          .decay = static_cast<float>(lr * rule_->weight_decay()),
                          .cautious = rule_->cautious()});
    return lr;
  }
  const Matrix& weight(size_t i = 0) const { return weights_[i]; }
  const Matrix& direction(size_t i = 0) const { return grads_[i]; }

 private:
  CpuContext ctx_{2, 0};
  std::unique_ptr<Rule> rule_;
  std::vector<Matrix> weights_, grads_;
  std::vector<std::vector<float>> state_;
  Group group_;
  int64_t t_ = 0;
};

struct Trajectory {
  const char* name;  // in the expected numbers
  const char* rule;
  double sharpness = 0;  // > 0: steepest descent
  double tolerance = 2e-5;
};
const Trajectory kTrajectories[] = {
    {"sgd", "sgd:lr=0.1"},
    {"sgd_momentum", "sgd:lr=0.1,momentum=0.9"},
    {"sgd_nesterov", "sgd:lr=0.1,momentum=0.9,nesterov=1"},
    {"lmo_frobenius", "sgd:lr=0.05,normalize=1"},
    {"lmo_l1_to_linf_maxabs", "sign:lr=0.05"},
    {"lmo_l2_to_l2_spectral", "spectral:lr=0.05,ns=svd", 0, 1e-4},
    {"lmo_rms_to_rms", "spectral:lr=0.05,ns=svd,scale=rms", 0, 1e-4},
    {"lmo_l1_to_rms", "colnorm:lr=0.05"},
    {"lmo_l1_to_l2_maxcol", "colnorm:lr=0.05,norm=l1-l2"},
    {"lmo_l2_to_linf_maxrow", "rownorm:lr=0.05,norm=l2-linf"},
    {"lmo_rms_to_linf", "rownorm:lr=0.05"},
    {"steepest_frobenius", "sgd", 20},
    {"steepest_l1_to_linf_maxabs", "sign", 20},
    {"steepest_l2_to_l2_spectral", "spectral:ns=svd", 20, 1e-4},
    {"steepest_rms_to_rms", "spectral:ns=svd,scale=rms", 20, 1e-4},
    {"steepest_l1_to_rms", "colnorm", 20},
    {"steepest_l1_to_l2_maxcol", "colnorm:norm=l1-l2", 20},
    {"steepest_l2_to_linf_maxrow", "rownorm:norm=l2-linf", 20},
    {"steepest_rms_to_linf", "rownorm", 20},
    {"signum", "signum:lr=0.01,beta=0.9"},
    {"adam", "adam:lr=0.01,beta1=0.9,beta2=0.95,eps=1e-8"},
    {"adam_no_bias", "adam:lr=0.01,beta1=0.9,beta2=0.95,eps=0,bias_correction=0"},
    {"adam_beta0", "adam:lr=0.01,beta1=0,beta2=0,eps=0"},
    {"adamw", "adam:lr=0.01,beta1=0.9,beta2=0.95,eps=1e-8,wd=0.1"},
    {"adamw_cautious_wd", "adam:lr=0.01,beta1=0.9,beta2=0.95,eps=1e-8,wd=0.1,cautious=1"},
    {"shampoo_no_accum", "spectral:lr=0.05,ns=svd", 0, 1e-4},  // equal by its equations 15-16
    {"muon_keller", "muon:lr=0.02,momentum=0.95,wd=0.01,ns=keller5,scale=keller", 0, 1e-4},
    {"muon_torch", "muon:lr=0.02,momentum=0.95,wd=0.1,ema=0", 0, 1e-4},
    {"muon_moonlight", "muon:lr=0.02,momentum=0.95,wd=0.1,ema=0,scale=moonlight", 0, 1e-4},
    {"muon_rms_exact", "muon:lr=0.02,momentum=0.95,nesterov=0,ns=svd,scale=rms", 0, 1e-4},
    {"muon_polar_express", "muon:lr=0.02,momentum=0.95,wd=0.01,ns=polar-express", 0, 1e-4},
    {"muon_quintic12", "muon:lr=0.025,momentum=0.95,wd=0.05,ns=quintic12", 0, 1e-4},
    {"muon_cautious_wd", "muon:lr=0.02,momentum=0.95,wd=0.1,ns=svd,cautious=1", 0, 1e-4},
};

Matrix start_weight() {
  return Matrix(optim_golden().at("W0"));
}
Matrix fixed_gradient(size_t t) {
  return Matrix(optim_golden().at("G").at(t));
}

/// Weights after three steps of the fixed gradients.
Matrix after_three(const std::string& rule) {
  RuleDriver driver(rule, {start_weight()});
  for (size_t t = 0; t < 3; ++t) driver.step({fixed_gradient(t)});
  return driver.weight();
}
}  // namespace

TEST(Rules, ExpectedTrajectories) {
  for (const Trajectory& row : kTrajectories) {
    SCOPED_TRACE(row.name);
    const json& weights = optim_golden().at("optimizers").at(row.name).at("W");
    RuleDriver driver(row.rule, {start_weight()});
    RuleDriver stored(row.rule, {start_weight().transposed()}, /*transposed=*/true);
    for (size_t t = 0; t < 3; ++t) {
      driver.step({fixed_gradient(t)}, row.sharpness);
      EXPECT_LT(deviation(driver.weight(), Matrix(weights.at(t))), row.tolerance) << "step " << t;
      stored.step({fixed_gradient(t).transposed()}, row.sharpness);  // an embedding's way round
      EXPECT_LT(deviation(stored.weight().transposed(), Matrix(weights.at(t))), row.tolerance)
          << "stored, step " << t;
    }
  }
}

TEST(Rules, Equalities) {
  EXPECT_EQ(after_three("adam:lr=0.01,beta1=0,beta2=0,eps=0").data, after_three("sign:lr=0.01").data);
  EXPECT_EQ(after_three("signum:lr=0.01,beta=0").data, after_three("sign:lr=0.01").data);
  EXPECT_EQ(after_three("muon:lr=0.01,momentum=0,ns=svd,scale=none").data,
            after_three("spectral:lr=0.01,ns=svd").data);
  EXPECT_EQ(after_three("sgd:lr=0.01,momentum=0.5,ema=1").data,
            after_three("sgd:lr=0.005,momentum=0.5").data);
  EXPECT_EQ(after_three("sign:lr=0.01,s=2").data, after_three("sign:lr=0.005").data);
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

// The state, and so the result, of each block is its own: together as apart, in whatever batches.
TEST(Rules, BlocksDoNotMix) {
  for (const RuleEntry& entry : rule_table())
    for (const auto& [rows, cols] : {std::pair{12, 12}, {8, 32}, {33, 9}}) {
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
        EXPECT_EQ(together.weight(i).data, apart[i]->weight().data) << entry.name;
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
    EXPECT_LT(deviation(together.weight(i), alone.weight()), 1e-4) << i;
  }
}

TEST(Rules, Messages) {
  const auto message = [](const std::string& text) -> std::string {
    try {
      make_rule("--hidden", text);
    } catch (const UsageError& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_NE(message("moun").find("muon"), std::string::npos);
  EXPECT_NE(message("muon:momentm=0.9").find("momentum"), std::string::npos);
  EXPECT_NE(message("muon:ns=keller6").find("polar-express"), std::string::npos);
  EXPECT_NE(message("muon:ns=svd,steps=3"), "");
  EXPECT_NE(message("adam:beta1=1"), "");
  EXPECT_NE(message("adam:lr=-1"), "");
  EXPECT_NE(message("adam:lr=nan"), "");
  EXPECT_NE(message("colnorm:norm=rms-linf"), "");
  EXPECT_EQ(message("adam:lr=0.1,wd=0.1,cautious=1,s=2,eps=0"), "");
  for (const RuleEntry& entry : rule_table()) EXPECT_EQ(message(entry.name), "");
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

namespace {
/// A small model's parameters with an optimizer, and gradients that depend on the step alone.
struct SmallModel {
  ModelConfig config{.name = "small", .L = 2, .NH = 2, .C = 16, .positions = 24, .V = 37};
  CpuContext ctx;
  ParameterTable table{config};
  Optimizer optimizer;

  explicit SmallModel(const OptimizerOptions& options, int threads = 2)
      : ctx(threads, 0), optimizer(ctx, table, options) {
    table.allocate(ctx, /*with_gradients=*/true);
    table.initialize(7);
    optimizer.allocate();
  }
  void set_gradients(int64_t t) {
    uint32_t seed = static_cast<uint32_t>(1000 * t);
    for (Parameter& p : table) {
      const Matrix g = random_matrix(1, p.size(), ++seed, 0.01f);
      std::copy(g.data.begin(), g.data.end(), p.grad.f32());
      if (p.role == Role::embedding) std::fill_n(p.grad.f32(), p.shape[1], 0.0f);  // an absent token
    }
  }
  StepReport step(int64_t t, int64_t total = 20) {
    set_gradients(t);
    return optimizer.step(t, total);
  }
  std::vector<float> weights() const {
    std::vector<float> all;
    for (const Parameter& p : table) all.insert(all.end(), p.value.f32(), p.value.f32() + p.size());
    return all;
  }
};

OptimizerOptions everywhere(const std::string& matrices, const std::string& vectors) {
  OptimizerOptions options;
  for (const Role role : kRoles)
    options.rules[role] = role == Role::vector || role == Role::scalar ? vectors : matrices;
  return options;
}

std::vector<OptimizerOptions> all_options() {
  std::vector<OptimizerOptions> list;
  for (const Recipe& recipe : recipe_table()) list.push_back(recipe_options(recipe.name));
  list.push_back(everywhere("spectral:momentum=0.9,ns=svd", "sgd:momentum=0.9,nesterov=1"));
  list.push_back(everywhere("rownorm:momentum=0.5,nesterov=1", "sign"));
  list.back().sharpness = 10;
  list.back().grad_clip = 0.1;
  return list;
}
}  // namespace

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
  for (size_t i = 0; i < 3; ++i) EXPECT_LT(deviation(fused[i], driver.weight(i)), 1e-6);
}

TEST(Optimizer, ClippingScalesGradients) {
  for (const char* vectors : {"adam:eps=1e-3", "sgd:lr=0.1", "sgd:momentum=0.9"}) {
    OptimizerOptions options = everywhere(vectors, vectors);
    SmallModel plain(options);
    options.grad_clip = 0.05;
    SmallModel clipped(options);
    for (int64_t t = 0; t < 3; ++t) {
      const StepReport report = clipped.step(t);
      EXPECT_NEAR(report.clip_scale, 0.05 / report.grad_norm, 1e-12);
      EXPECT_LT(report.clip_scale, 1);
      plain.set_gradients(t);
      double squares = 0;
      for (Parameter& p : plain.table) {
        for (float& g : p.grad.floats()) {
          squares += static_cast<double>(g) * g;
          g *= static_cast<float>(report.clip_scale);
        }
      }
      EXPECT_NEAR(report.grad_norm / std::sqrt(squares), 1, 1e-9);
      plain.optimizer.step(t, 20);
    }
    const auto a = plain.weights(), b = clipped.weights();
    for (size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 1e-6);
  }
}

TEST(Optimizer, NonFiniteGradientChangesNothing) {
  for (const float bad : {std::nanf(""), INFINITY, -INFINITY}) {
    SmallModel model(recipe_options("muon"));
    model.step(0);
    const auto weights = model.weights();
    std::vector<float> state;
    const auto copy_state = [&] {
      std::vector<float> all;
      for (const NamedTensor& tensor : model.optimizer.state())
        all.insert(all.end(), tensor.value.f32(), tensor.value.f32() + tensor.value.size());
      return all;
    };
    const auto before = copy_state();
    model.set_gradients(1);
    model.table.at("h.1.mlp.c_fc.weight").grad.f32()[5] = bad;
    try {
      model.optimizer.step(1, 20);
      FAIL() << "no error";
    } catch (const RunError& error) {
      EXPECT_NE(std::string(error.what()).find("h.1.mlp.c_fc.weight"), std::string::npos);
      EXPECT_NE(std::string(error.what()).find("step 1"), std::string::npos);
    }
    EXPECT_EQ(model.weights(), weights);
    EXPECT_EQ(copy_state(), before);
  }
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
        return ModularTerm{x, NormKind::l1_rms, 3, true};
      case Role::position:
        return ModularTerm{x, NormKind::frobenius, 1, true};
      case Role::vector:
        return ModularTerm{x, NormKind::l1_linf, 0.5, false};
      default:
        return ModularTerm{x, NormKind::rms_rms, 2, false};
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
  const StepReport report = model.optimizer.step(0, 0);
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
