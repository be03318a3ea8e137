// Rules and optimizers under test on either device, and the checks that both devices share.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "error.h"
#include "model/kernels/reduce.h"
#include "optim/hyperball.h"
#include "optim/optimizer.h"
#include "optim/recipe.h"
#include "optim/update.h"
#include "tests/optim_golden.h"

/// What make_rule says of a text that it refuses; empty when it does not.
inline std::string rule_message(const std::string& text) {
  try {
    make_rule("--hidden", text);
  } catch (const UsageError& error) {
    return error.what();
  }
  return "";
}

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
    group_ = {.shape = shape, .transposed = transposed, .blocks = {}, .dtype = dtype};
    auto specs = rule_->state(group_);
    if (rule_->hyperball()) specs.push_back({.name = "radius", .shape = {}});
    for (const StateSpec& spec : specs) state_names_.push_back(spec.name);
    std::vector<Tensor> states(specs.size());
    Tensor anchors;
    arena_.add(&weights_, dtype, {count, shape[0], shape[1]});
    arena_.add(&grads_, dtype, {count, shape[0], shape[1]});
    arena_.add(&anchors, dtype, {count, shape[0], shape[1]});
    for (size_t k = 0; k < specs.size(); ++k) arena_.add(&states[k], dtype, {count, specs[k].shape.size()});
    arena_.allocate(ctx_);
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
                          .step = lr / rule_->sensitivity(),
                          .decay = lr * rule_->weight_decay(),
                          .cautious = rule_->cautious()});
    return lr;
  }
  M weight(int64_t i = 0) { return download<T>(ctx_, weights_[i]); }
  M direction(int64_t i = 0) { return download<T>(ctx_, grads_[i]); }
  double eta() const { return escape_->eta(); }
  /// The state of that name, of the first matrix.
  void set_state(const std::string& name, const M& value) { upload(ctx_, state(name), value); }
  M state_value(const std::string& name) { return download<T>(ctx_, state(name)); }

 private:
  const Tensor& state(const std::string& name) {
    const auto at = std::ranges::find(state_names_, name) - state_names_.begin();
    return group_.blocks[0].state.at(static_cast<size_t>(at));
  }

  Context ctx_;
  std::unique_ptr<Rule> rule_;
  std::optional<EscapeVelocity> escape_;
  Arena arena_{"rule"};
  std::vector<std::string> state_names_;
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
    {"lion", "lion:lr=0.01,beta1=0.9,beta2=0.99,wd=0.1"},
    {"adam", "adam:lr=0.01,beta1=0.9,beta2=0.95,eps=1e-8"},
    {"adam_no_bias", "adam:lr=0.01,beta1=0.9,beta2=0.95,eps=0,bias_correction=0"},
    {"adam_beta0", "adam:lr=0.01,beta1=0,beta2=0,eps=0"},
    {"adamw", "adam:lr=0.01,beta1=0.9,beta2=0.95,eps=1e-8,wd=0.1"},
    {"adamw_cautious_wd", "adam:lr=0.01,beta1=0.9,beta2=0.95,eps=1e-8,wd=0.1,cautious=1"},
    {"shampoo_no_accum", "spectral:lr=0.05,ns=svd", 0, 1e-4},  // equal by its equations 15-16
    {"muon_keller", "muon:lr=0.02,momentum=0.95,wd=0.01,ns=keller5,scale=keller,ns_eps=1e-7", 0, 1e-4},
    {"muon_torch", "muon:lr=0.02,momentum=0.95,wd=0.1,ema=0,ns_eps=1e-7", 0, 1e-4},
    {"muon_moonlight", "muon:lr=0.02,momentum=0.95,wd=0.1,ema=0,scale=moonlight,ns_eps=1e-7", 0, 1e-4},
    {"muon_rms_exact", "muon:lr=0.02,momentum=0.95,nesterov=0,ns=svd,scale=rms", 0, 1e-4},
    {"muon_polar_express", "muon:lr=0.02,momentum=0.95,wd=0.01,ns=polar-express,ns_eps=1e-6", 0, 1e-4},
    {"muon_quintic12", "muon:lr=0.025,momentum=0.95,wd=0.05,ns=quintic12,ns_eps=1e-7", 0, 1e-4},
    {"muon_cautious_wd", "muon:lr=0.02,momentum=0.95,wd=0.1,ns=svd,cautious=1", 0, 1e-4},
    {"muon_hyperball", "muon:lr=0.02,momentum=0.95,ns=svd,hyperball=1", 0, 1e-4},
    {"normuon", "normuon:lr=0.02,momentum=0.95,beta2=0.95,wd=0.01,ns=svd", 0, 1e-4},
    {"scion_spectral", "scion:lr=0.02,alpha=0.1,radius=3,constrained=1,ns=svd", 0, 1e-4},
    {"scion_spectral_unconstrained", "scion:lr=0.02,alpha=0.1,radius=3,ns=svd", 0, 1e-4},
    {"scion_sign", "scion:lr=0.02,alpha=0.1,radius=5,constrained=1,norm=scaled-l1-linf"},
    {"scion_colnorm", "scion:lr=0.02,alpha=0.1,constrained=1,norm=l1-rms"},
    {"scion_rownorm", "scion:lr=0.02,alpha=0.1,constrained=1,norm=rms-linf"},
    {"dion_rank1", "dion:lr=0.02,momentum=0.95,wd=0.01,rank=1"},
};

template <typename T = float>
MatrixOf<T> start_weight() {
  return MatrixOf<T>(optim_golden().at("W0"));
}
template <typename T = float>
MatrixOf<T> fixed_gradient(size_t t) {
  return MatrixOf<T>(optim_golden().at("G").at(t));
}

/// Weights after three steps of the fixed gradients.
inline Matrix after_three(const std::string& rule, UseDevice use = on_cpu) {
  RuleDriver driver(rule, {start_weight()}, /*transposed=*/false, use);
  for (size_t t = 0; t < 3; ++t) driver.step({fixed_gradient(t)});
  return driver.weight();
}

/// One trajectory, of a matrix as it is and of one that is stored the other way round, as embeddings are.
template <typename T>
void check_trajectory(const Trajectory& row, double tolerance, UseDevice use) {
  SCOPED_TRACE(std::string(row.name) + (sizeof(T) == 8 ? ", float64" : ", float32"));
  const nlohmann::json& expected = optim_golden().at("optimizers").at(row.name);
  RuleDriverOf<T> driver(row.rule, {start_weight<T>()}, /*transposed=*/false, use);
  RuleDriverOf<T> stored(row.rule, {start_weight<T>().transposed()}, /*transposed=*/true, use);
  if (expected.at("hyper").contains("Q0"))
    for (RuleDriverOf<T>* each : {&driver, &stored})
      each->set_state("q", MatrixOf<T>(expected.at("hyper").at("Q0")));
  for (size_t t = 0; t < 3; ++t) {
    const MatrixOf<T> want(expected.at("W").at(t));
    driver.step({fixed_gradient<T>(t)}, row.sharpness);
    EXPECT_LT(deviation(driver.weight(), want), tolerance) << "step " << t;
    stored.step({fixed_gradient<T>(t).transposed()}, row.sharpness);
    EXPECT_LT(deviation(stored.weight().transposed(), want), tolerance) << "stored, step " << t;
  }
}

inline void check_trajectories(UseDevice use) {
  for (const Trajectory& row : kTrajectories) {
    check_trajectory<float>(row, row.tolerance, use);
    check_trajectory<double>(row, 1e-9, use);
  }
}

inline void check_equalities(UseDevice use) {
  EXPECT_EQ(after_three("adam:lr=0.01,beta1=0,beta2=0,eps=0", use).data,
            after_three("sign:lr=0.01", use).data);
  EXPECT_EQ(after_three("signum:lr=0.01,beta=0", use).data, after_three("sign:lr=0.01", use).data);
  EXPECT_EQ(after_three("lion:lr=0.01,beta1=0.9,beta2=0.9", use).data,
            after_three("signum:lr=0.01,beta=0.9", use).data);
  EXPECT_EQ(after_three("scion:lr=0.01,alpha=1,norm=l1-linf", use).data,
            after_three("sign:lr=0.01", use).data);
  EXPECT_EQ(after_three("scion:lr=0.01,alpha=1,ns=svd", use).data,
            after_three("spectral:lr=0.01,ns=svd,scale=rms", use).data);
  EXPECT_LT(
      deviation(after_three("scion:lr=0.01,radius=5,constrained=1", use),
                after_three("muon:lr=0.05,wd=0.2,momentum=0.9,nesterov=0,ns=polar-express,scale=rms", use)),
      1e-6);
  EXPECT_EQ(after_three("muon:lr=0.01,momentum=0,ns=svd,scale=none", use).data,
            after_three("spectral:lr=0.01,ns=svd", use).data);
  EXPECT_EQ(after_three("sgd:lr=0.01,momentum=0.5,ema=1", use).data,
            after_three("sgd:lr=0.005,momentum=0.5", use).data);
  EXPECT_EQ(after_three("sign:lr=0.01,s=2", use).data, after_three("sign:lr=0.005", use).data);
}

/// A context on one of several ranks: what asks for their number comes later. Null: the only one.
struct RankContext {
  Context ctx;

  explicit RankContext(std::shared_ptr<Comm> comm) {
    if (comm) ctx.comm = std::move(comm);
  }
};

/// A small model's parameters with an optimizer, and gradients that depend on the step alone.
struct SmallModel : RankContext {
  ModelConfig config;
  ParameterTable table;
  Optimizer optimizer;

  explicit SmallModel(const OptimizerOptions& options, UseDevice use = on_cpu, int64_t C = 16,
                      std::shared_ptr<Comm> comm = nullptr)
      : RankContext(std::move(comm)),
        config{.name = "small", .L = 2, .NH = 1, .C = C, .positions = 24, .V = 37},
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

/// Every rule with its default keys but these, on all the tensors that it accepts.
inline std::vector<OptimizerOptions> every_rule(const std::string& keys = "") {
  std::vector<OptimizerOptions> list;
  for (const RuleEntry& entry : rule_table()) {
    const bool matrices_only = make_rule("--hidden", entry.name)->matrices_only();
    const std::string rule = entry.name + keys;
    list.push_back(everywhere(rule, matrices_only ? "sign" : rule));
  }
  return list;
}

inline std::vector<OptimizerOptions> all_options() {
  std::vector<OptimizerOptions> list = every_rule();
  for (const Recipe& recipe : recipe_table()) list.push_back(recipe_options(recipe.name));
  list.push_back(everywhere("muon:wd=0.1,cautious=1", "adam"));
  list.back().rules[Role::hidden] = "adam:hyperball=1";
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
inline void check_non_finite(const OptimizerOptions& options, float bad, UseDevice use) {
  SCOPED_TRACE(options.rules.at(Role::hidden));
  SmallModel model(options, use);
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
inline void check_non_finite(UseDevice use) {
  for (const char* recipe : {"muon", "adamw", "modular"})
    check_non_finite(recipe_options(recipe), std::nanf(""), use);
  for (const float bad : {INFINITY, -INFINITY})  // one bad value reaches all recipes the same way
    check_non_finite(recipe_options("muon"), bad, use);
  for (OptimizerOptions options : every_rule())
    for (const double clip : {0.0, 0.01}) {
      options.grad_clip = clip;
      check_non_finite(options, std::nanf(""), use);
    }
}

/// Gradients of zero: nothing moves, nothing becomes NaN.
inline void check_zero_gradients(UseDevice use) {
  for (const OptimizerOptions& options : every_rule(":wd=0")) {
    SCOPED_TRACE(options.rules.at(Role::hidden));
    SmallModel model(options, use);
    const auto weights = model.weights();
    for (int64_t t = 0; t < 2; ++t) {
      for (const Parameter& p : model.table) upload(model.ctx, p.grad, Matrix(1, p.size()));
      model.optimizer.step(t, 0);
    }
    EXPECT_EQ(model.weights(), weights);
    for (const float x : model.state()) ASSERT_TRUE(std::isfinite(x));
  }
}

/// Rows, columns, matrices of rank 1, the very small and the very large: every rule finds a direction.
inline void check_extreme_gradients(UseDevice use) {
  const std::set<std::string> keeps_squares = {"oneside", "prodigy"};  // those of denormal gradients are 0
  for (const RuleEntry& entry : rule_table()) {
    const auto check = [&](const char* what, const Matrix& w, const Matrix& g, bool transposed,
                           bool may_stand_still = false) {
      RuleDriver driver(entry.name, {w}, transposed, use);
      for (int t = 0; t < 2; ++t) {
        driver.step({g});
        for (const float u : driver.direction().data)
          ASSERT_TRUE(std::isfinite(u)) << entry.name << ", " << what;
      }
      const double downhill = inner(driver.direction(), scaled(g, 1 / std::sqrt(inner(g, g))));
      EXPECT_TRUE(downhill > 0 || (may_stand_still && downhill == 0)) << entry.name << ", " << what;
    };
    for (const bool transposed : {false, true}) {
      const Matrix w = random_matrix(6, 9, 1), g = random_matrix(6, 9, 2);
      check("a row", random_matrix(1, 7, 3), random_matrix(1, 7, 4), transposed);
      check("a column", random_matrix(7, 1, 3), random_matrix(7, 1, 4), transposed);
      check("one number", random_matrix(1, 1, 3), random_matrix(1, 1, 4), transposed);
      check("rank 1", w, product(random_matrix(6, 1, 5), random_matrix(1, 9, 6)), transposed);
      check("1e-20", w, scaled(g, 1e-20), transposed);
      check("1e-40, denormal", w, scaled(g, 1e-40), transposed, keeps_squares.contains(entry.name));
      check("1e20", w, scaled(g, 1e20), transposed);
    }
  }
}

/// Properties of optimizers.md, section 3, items 5 and 9.
inline void check_scion_stays_in_its_ball(UseDevice use) {
  for (const char* name : {"rms-rms", "scaled-l1-linf", "l1-rms", "rms-linf", "frobenius"}) {
    const std::string keys = name == std::string("rms-rms") ? ",ns=svd" : "";
    Context ctx;
    use(ctx);
    ctx.scratch.reserve(1 << 20);
    const Norm kind = *find_norm(name);
    const auto size = [&](const Matrix& w) { return norm(ctx, kind, There(ctx, w).tensor()); };
    Matrix w = random_matrix(5, 3, 1);
    w = scaled(w, 2 / size(w));  // on the boundary
    RuleDriver driver(std::string("scion:lr=0.05,radius=2,constrained=1,norm=") + name + keys, {w},
                      /*transposed=*/false, use);
    double largest = 0, smallest = 2;
    for (uint32_t t = 0; t < 500; ++t) {
      driver.step({random_matrix(5, 3, 100 + t)});
      const double now = size(driver.weight());
      largest = std::max(largest, now), smallest = std::min(smallest, now);
    }
    EXPECT_LT(largest, 2 * (1 + 1e-5)) << name;
    EXPECT_LT(smallest, 1.9) << name;  // it does move
  }
}

inline void check_hyperball_keeps_the_size(UseDevice use) {
  for (const char* rule : {"muon:hyperball=1", "adam:hyperball=1", "muon:hyperball=1,momentum=0"}) {
    const Matrix w = random_matrix(5, 3, 1);
    RuleDriver driver(rule, {w}, /*transposed=*/false, use);
    for (uint32_t t = 0; t < 500; ++t) {
      driver.step({random_matrix(5, 3, 100 + t)});
      const Matrix now = driver.weight();
      ASSERT_NEAR(inner(now, now) / inner(w, w), 1, 1e-5) << rule << ", step " << t;
    }
    EXPECT_GT(deviation(driver.weight(), w), 0.01) << rule;
  }
}

/// As large as muon's update, in Frobenius norm, with lines of more equal size.
inline void check_normuon_evens_lines(UseDevice use) {
  struct Case {
    int64_t rows, cols;
    const char* keys;
    bool by_rows;
  };
  for (const Case& c : {Case{9, 4, "", true}, {9, 4, ",axis=auto", true}, {4, 9, ",axis=auto", false}}) {
    const Matrix w(c.rows, c.cols);
    const std::string keys = ":momentum=0.5,ns=svd";
    RuleDriver even("normuon" + keys + c.keys, {w}, false, use), plain("muon" + keys, {w}, false, use);
    for (uint32_t t = 0; t < 30; ++t) {
      Matrix g = random_matrix(c.rows, c.cols, 200 + t);
      for (int64_t k = 0; k < (c.by_rows ? c.cols : c.rows); ++k) (c.by_rows ? g(0, k) : g(k, 0)) *= 0.1f;
      even.step({g});
      plain.step({g});
    }
    const Matrix p = even.direction(), o = plain.direction();
    EXPECT_NEAR(inner(p, p) / inner(o, o), 1, 1e-5);
    const auto smallest_line = [&](Matrix m) {
      if (!c.by_rows) m = m.transposed();
      double smallest = 1e30;
      for (int64_t i = 0; i < m.rows; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < m.cols; ++j) sum += m(i, j) * m(i, j);
        smallest = std::min(smallest, std::sqrt(sum));
      }
      return smallest;
    };
    EXPECT_GT(smallest_line(p), 2 * smallest_line(o)) << c.keys;
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
