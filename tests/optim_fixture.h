// Rules and optimizers under test on either device, and the checks that both devices share.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "error.h"
#include "model/kernels/reduce.h"
#include "optim/optimizer.h"
#include "optim/recipe.h"
#include "optim/update.h"
#include "tests/optim_golden.h"

/// What make_rule says of a text that it refuses; empty when it does not.
std::string rule_message(const std::string& text);

/// A rule on matrices of one shape, outside any model; the step is the optimizer's. The matrices lie one
/// after the other, so that those of odd sizes begin anywhere.
template <typename T>
class RuleDriverOf {
 public:
  using M = MatrixOf<T>;
  RuleDriverOf(const std::string& text, const std::vector<M>& weights, bool transposed = false,
               UseDevice use = on_cpu);
  /// One step; `sharpness` > 0 takes the step size from the dual norm. Returns that step size.
  double step(const std::vector<M>& gradients, double sharpness = 0);
  M weight(int64_t i = 0) { return download<T>(ctx_, weights_[i]); }
  M direction(int64_t i = 0) { return download<T>(ctx_, grads_[i]); }
  double eta() const { return escape_->eta(); }
  /// The state of that name, of the first matrix.
  void set_state(const std::string& name, const M& value) { upload(ctx_, state(name), value); }
  M state_value(const std::string& name) { return download<T>(ctx_, state(name)); }

 private:
  const Tensor& state(const std::string& name);

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

template <typename T = float>
MatrixOf<T> start_weight();
template <typename T = float>
MatrixOf<T> fixed_gradient(size_t t);

/// Weights after three steps of the fixed gradients.
Matrix after_three(const std::string& rule, UseDevice use = on_cpu);

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
                      std::shared_ptr<Comm> comm = nullptr);
  void set_gradients(int64_t t);
  StepReport step(int64_t t, int64_t total = 20);
  std::vector<float> weights();
  std::vector<float> state();

 private:
  void append(std::vector<float>& all, const Tensor& tensor) { append(all, tensor, &ctx); }
  void append(std::vector<float>& all, const Tensor& tensor, Context* where);
};

OptimizerOptions everywhere(const std::string& matrices, const std::string& vectors);

/// Every rule with its default keys but these, on all the tensors that it accepts.
std::vector<OptimizerOptions> every_rule(const std::string& keys = "");

std::vector<OptimizerOptions> all_options();
