// Rules and optimizers under test on either device, and the checks that both devices share.
#pragma once

#include <gtest/gtest.h>

#include <cmath>

#include "error.h"
#include "model/kernels/reduce.h"
#include "optim/hyperball.h"
#include "optim/optimizer.h"
#include "optim/recipe.h"
#include "optim/update.h"
#include "tests/optim_golden.h"

/// A rule on matrices of one shape, outside any model; the step is the optimizer's. The matrices lie one
/// after the other, so that those of odd sizes begin anywhere.
template <typename T>
class RuleDriverOf {
 public:
  using M = MatrixOf<T>;
  RuleDriverOf(const std::string& text, const std::vector<M>& weights, bool transposed = false,
               UseDevice use = on_cpu)
      : rule_(make_rule("--hidden", text)) {
    use(ctx_);
    if (rule_->escapes()) escape_.emplace(*rule_->escapes());
    const auto count = static_cast<int64_t>(weights.size());
    const Shape shape{weights.at(0).rows, weights.at(0).cols};
    const DType dtype = dtype_of<T>();
    auto specs = rule_->state(shape);
    if (rule_->hyperball()) specs.push_back({.name = "radius", .shape = {}});
    std::vector<Tensor> states(specs.size());
    Tensor anchors;
    arena_.add(&weights_, dtype, {count, shape[0], shape[1]});
    arena_.add(&grads_, dtype, {count, shape[0], shape[1]});
    arena_.add(&anchors, dtype, {count, shape[0], shape[1]});
    for (size_t k = 0; k < specs.size(); ++k) arena_.add(&states[k], dtype, {count, specs[k].shape.size()});
    arena_.allocate(ctx_);
    group_ = {.shape = shape, .transposed = transposed, .blocks = {}, .dtype = dtype};
    for (int64_t i = 0; i < count; ++i) {
      upload(ctx_, weights_[i], weights[static_cast<size_t>(i)]);
      upload(ctx_, anchors[i], weights[static_cast<size_t>(i)]);
      Block block{.weight = weights_[i], .grad = grads_[i], .state = {}, .anchor = anchors[i]};
      for (size_t k = 0; k < specs.size(); ++k) block.state.push_back(states[k][i].view(specs[k].shape));
      group_.blocks.push_back(block);
    }
    ctx_.scratch.reserve(std::max(rule_->scratch_bytes(ctx_, group_),
                                  std::max(hyperball_scratch_bytes(group_), whole_scratch_bytes())));
  }
  /// One step; `sharpness` > 0 takes the step size from the dual norm. Returns that step size.
  double step(const std::vector<M>& gradients, double sharpness = 0) {
    for (size_t i = 0; i < gradients.size(); ++i) upload(ctx_, group_.blocks[i].grad, gradients[i]);
    RuleStep step{.t = ++t_, .measure = sharpness > 0, .lr = rule_->lr()};
    if (escape_) {
      step.eta = escape_->eta(), step.first_eta = escape_->first();
      step.lr *= step.eta;
      const Measured sums = rule_->prepare(ctx_, group_, step);
      step.next_eta = escape_->after(sums);
      escape_->update(sums);
    }
    const Measured measured = rule_->direction(ctx_, group_, step);
    const double lr = sharpness > 0 ? measured.dual / rule_->sensitivity() / sharpness : step.lr;
    if (rule_->hyperball()) hyperball(ctx_, group_.blocks, lr, t_ == 1);
    for (const Block& block : group_.blocks)
      apply_update(ctx_, {.w = block.weight,
                          .u = block.grad,
                          .step = static_cast<T>(lr / rule_->sensitivity()),
                          .decay = static_cast<T>(lr * rule_->weight_decay()),
                          .cautious = rule_->cautious()});
    return lr;
  }
  M weight(int64_t i = 0) { return download<T>(ctx_, weights_[i]); }
  M direction(int64_t i = 0) { return download<T>(ctx_, grads_[i]); }
  double eta() const { return escape_->eta(); }

 private:
  Context ctx_;
  std::unique_ptr<Rule> rule_;
  std::optional<EscapeVelocity> escape_;
  Arena arena_{"rule"};
  Tensor weights_, grads_;  // (blocks, rows, cols)
  Group group_;
  int64_t t_ = 0;
};
using RuleDriver = RuleDriverOf<float>;

struct Trajectory {
  const char* name;  // in the expected numbers
  const char* rule;
  double sharpness = 0;  // > 0: steepest descent
  double tolerance = 2e-5;
};
inline const Trajectory kTrajectories[] = {
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

inline Matrix start_weight() {
  return Matrix(optim_golden().at("W0"));
}
inline Matrix fixed_gradient(size_t t) {
  return Matrix(optim_golden().at("G").at(t));
}

/// Weights after three steps of the fixed gradients.
inline Matrix after_three(const std::string& rule, UseDevice use = on_cpu) {
  RuleDriver driver(rule, {start_weight()}, /*transposed=*/false, use);
  for (size_t t = 0; t < 3; ++t) driver.step({fixed_gradient(t)});
  return driver.weight();
}

inline void check_trajectories(UseDevice use) {
  for (const Trajectory& row : kTrajectories) {
    SCOPED_TRACE(row.name);
    const nlohmann::json& weights = optim_golden().at("optimizers").at(row.name).at("W");
    RuleDriver driver(row.rule, {start_weight()}, /*transposed=*/false, use);
    RuleDriver stored(row.rule, {start_weight().transposed()}, /*transposed=*/true, use);
    for (size_t t = 0; t < 3; ++t) {
      driver.step({fixed_gradient(t)}, row.sharpness);
      EXPECT_LT(deviation(driver.weight(), Matrix(weights.at(t))), row.tolerance) << "step " << t;
      stored.step({fixed_gradient(t).transposed()}, row.sharpness);  // an embedding's way round
      EXPECT_LT(deviation(stored.weight().transposed(), Matrix(weights.at(t))), row.tolerance)
          << "stored, step " << t;
    }
  }
}

inline void check_equalities(UseDevice use) {
  EXPECT_EQ(after_three("adam:lr=0.01,beta1=0,beta2=0,eps=0", use).data,
            after_three("sign:lr=0.01", use).data);
  EXPECT_EQ(after_three("signum:lr=0.01,beta=0", use).data, after_three("sign:lr=0.01", use).data);
  EXPECT_EQ(after_three("muon:lr=0.01,momentum=0,ns=svd,scale=none", use).data,
            after_three("spectral:lr=0.01,ns=svd", use).data);
  EXPECT_EQ(after_three("sgd:lr=0.01,momentum=0.5,ema=1", use).data,
            after_three("sgd:lr=0.005,momentum=0.5", use).data);
  EXPECT_EQ(after_three("sign:lr=0.01,s=2", use).data, after_three("sign:lr=0.005", use).data);
}

/// A small model's parameters with an optimizer, and gradients that depend on the step alone.
struct SmallModel {
  ModelConfig config;
  Context ctx;
  ParameterTable table;
  Optimizer optimizer;

  explicit SmallModel(const OptimizerOptions& options, UseDevice use = on_cpu, int64_t C = 16)
      : config{.name = "small", .L = 2, .NH = 1, .C = C, .positions = 24, .V = 37},
        table(config),
        optimizer(ctx, table, options) {
    use(ctx);
    table.allocate(ctx, /*with_gradients=*/true);
    table.initialize(7);
    optimizer.allocate();
  }
  void set_gradients(int64_t t) {
    uint32_t seed = static_cast<uint32_t>(1000 * t);
    for (const Parameter& p : table) {
      Matrix g = random_matrix(1, p.size(), ++seed, 0.01f);
      if (p.role == Role::embedding) std::fill_n(g.data.begin(), p.shape[1], 0.0f);  // an absent token
      upload(ctx, p.grad, g);
    }
  }
  StepReport step(int64_t t, int64_t total = 20) {
    set_gradients(t);
    optimizer.step(t, total);
    return optimizer.report();
  }
  std::vector<float> weights() {
    std::vector<float> all;
    for (const Parameter& p : table) append(all, p.value);
    return all;
  }
  std::vector<float> state() {
    std::vector<float> all;
    for (const NamedTensor& tensor : optimizer.state()) append(all, tensor.value, tensor.where);
    return all;
  }

 private:
  void append(std::vector<float>& all, const Tensor& tensor) { append(all, tensor, &ctx); }
  void append(std::vector<float>& all, const Tensor& tensor, Context* where) {
    Context host;
    const Matrix m = download(where != nullptr ? *where : host, tensor);
    all.insert(all.end(), m.data.begin(), m.data.end());
  }
};

inline OptimizerOptions everywhere(const std::string& matrices, const std::string& vectors) {
  OptimizerOptions options;
  for (const Role role : kRoles)
    options.rules[role] = role == Role::vector || role == Role::scalar ? vectors : matrices;
  return options;
}

inline std::vector<OptimizerOptions> all_options() {
  std::vector<OptimizerOptions> list;
  for (const Recipe& recipe : recipe_table()) list.push_back(recipe_options(recipe.name));
  list.push_back(everywhere("spectral:momentum=0.9,ns=svd", "sgd:momentum=0.9,nesterov=1"));
  list.push_back(everywhere("rownorm:momentum=0.5,nesterov=1", "sign"));
  list.back().sharpness = 10;
  list.back().grad_clip = 0.1;
  return list;
}
inline void check_clipping(UseDevice use) {
  for (const char* vectors : {"adam:eps=1e-3", "sgd:lr=0.1", "sgd:momentum=0.9"}) {
    OptimizerOptions options = everywhere(vectors, vectors);
    SmallModel plain(options, use);
    options.grad_clip = 0.05;
    SmallModel clipped(options, use);
    for (int64_t t = 0; t < 3; ++t) {
      const StepReport report = clipped.step(t);
      EXPECT_NEAR(report.clip_scale, 0.05 / report.grad_norm, 1e-12);
      EXPECT_LT(report.clip_scale, 1);
      plain.set_gradients(t);
      double squares = 0;
      for (const Parameter& p : plain.table) {
        Matrix grad = download(plain.ctx, p.grad);
        squares += inner(grad, grad);
        upload(plain.ctx, p.grad, scaled(grad, static_cast<float>(report.clip_scale)));
      }
      EXPECT_NEAR(report.grad_norm / std::sqrt(squares), 1, 1e-9);
      plain.optimizer.step(t, 20);
    }
    const auto a = plain.weights(), b = clipped.weights();
    for (size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 1e-6);
  }
}

/// Steps that nobody reports stay without effect until the gradients are finite again.
inline void check_non_finite(UseDevice use) {
  for (const float bad : {std::nanf(""), INFINITY, -INFINITY})
    for (const char* recipe : {"muon", "adamw", "modular"}) {
      if (!std::isnan(bad) && recipe != std::string("muon")) continue;  // one bad value reaches all the same
      SmallModel model(recipe_options(recipe), use);
      model.step(0);
      const auto weights = model.weights(), before = model.state();
      const Tensor poisoned = model.table.at("h.1.mlp.c_fc.weight").grad;
      for (int64_t t : {1, 2}) {
        model.set_gradients(t);
        Matrix grad = download(model.ctx, poisoned);
        grad.data[5] = bad;
        upload(model.ctx, poisoned, grad);
        model.optimizer.step(t, 20);
        EXPECT_EQ(model.weights(), weights);
        EXPECT_EQ(model.state(), before);
      }
      try {
        model.optimizer.report();
        FAIL() << "no error";
      } catch (const RunError& error) {
        EXPECT_NE(std::string(error.what()).find("h.1.mlp.c_fc.weight"), std::string::npos);
        EXPECT_NE(std::string(error.what()).find("step 2"), std::string::npos);
      }
      model.step(3);
      EXPECT_NE(model.weights(), weights);
      for (float w : model.weights()) ASSERT_TRUE(std::isfinite(w));
    }
}

/// A step's report can be read after the next step was enqueued, not after the one behind that.
inline void check_late_reports(UseDevice use) {
  SmallModel model(recipe_options("adamw"), use), prompt(recipe_options("adamw"), use);
  std::vector<int64_t> tickets;
  for (int64_t t = 0; t < 4; ++t) {
    model.set_gradients(t);
    model.optimizer.step(t, 20);
    tickets.push_back(model.optimizer.mark());
    const StepReport want = prompt.step(t);
    EXPECT_EQ(want.step, t);
    if (t == 0) continue;
    const StepReport late = model.optimizer.report(tickets[static_cast<size_t>(t)]);
    EXPECT_EQ(late.step, t);
    EXPECT_EQ(late.grad_norm, want.grad_norm);
    EXPECT_EQ(late.lr, want.lr);
    EXPECT_EQ(model.optimizer.report(tickets[static_cast<size_t>(t) - 1]).step, t - 1);
  }
  EXPECT_THROW(model.optimizer.report(tickets[1]), std::logic_error);
}
