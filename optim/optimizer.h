// The optimizer: gives every tensor of the parameter table a rule by its role, and makes the steps.
//
// One step, with gradients in Parameter::grad:
//   1. ||g||_2 over all tensors. A tensor that is not finite: RunError naming it, before anything has
//   changed.
//   2. Clipping: all gradients times min(1, grad_clip / ||g||_2), folded into what comes next.
//   3. Every group of equal blocks: its rule replaces gradients by update directions u (rule.h).
//   4. W <- W - lr wd W - (lr / s) u for every tensor, where lr is the schedule's multiplier times the rule's
//   lr;
//      or, with a sharpness (Proposition 7, modular.h), one eta for all in the place of lr.
// Afterwards Parameter::grad holds the directions; the caller clears it before the next backward pass.
//
// Deterministic for a given number of threads; nothing is allocated in step().
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "model/parameters.h"
#include "model/safetensors.h"
#include "optim/rule.h"
#include "optim/schedule.h"

struct OptimizerOptions {
  std::map<Role, std::string>
      rules;  // role -> "NAME:key=value,..."; a role that the model has must be present
  Schedule schedule = {};
  double grad_clip = 0;  // largest global gradient norm; 0: no clipping
  double sharpness = 0;  // lambda of Proposition 7; 0: the step size is each rule's lr. When > 0 the
                         // rules' lr are not used: eta comes from the dual norms of the gradient
};

/// What a step did, for the log.
struct StepReport {
  double grad_norm = 0;   // ||g||_2 over all tensors, before clipping
  double clip_scale = 1;  // what gradients were multiplied by
  double lr = 0;          // the hidden rule's lr after the schedule, or eta under sharpness
};

/// How one parameter is updated, for `info`.
struct RowInfo {
  std::string parameter;
  Role role;
  std::string rule;  // what the user wrote, "muon:lr=0.02"
  std::string norm;  // "RMS->RMS"
  int matrices;      // blocks that the rule sees
  double lr;
  double weight_decay;
  double sensitivity;
  int64_t state_bytes;
};

class Optimizer {
 public:
  /// Assigns rules; no memory yet. Throws UsageError for a bad rule, a missing role, or a rule that needs
  /// matrices given to vectors. `table` must outlive the optimizer.
  Optimizer(Context& ctx, ParameterTable& table, const OptimizerOptions& options);
  ~Optimizer();

  /// Takes the memory of the state and reserves ctx.scratch. Call after table.allocate().
  void allocate();
  /// Makes step t (counted from 0) of `total`.
  StepReport step(int64_t t, int64_t total);

  /// The whole state that a resumed run needs besides weights and step number; the tensors may be written to.
  /// Names are "<parameter>.<state>", e.g. "h.0.mlp.c_fc.weight.m"; shapes are logical, without padding.
  std::vector<NamedTensor> state();
  int64_t state_bytes() const { return arena_.bytes(); }
  int64_t scratch_bytes() const;
  std::vector<RowInfo> describe() const;

 private:
  struct Row;    // one parameter: its rule and state
  struct Batch;  // one Group and the rule that it is under
  size_t batch_for(const Row& row);
  double gradient_norm(int64_t t) const;
  double directions(const RuleStep& step);
  void apply(const Row& row, double lr);

  Context& ctx_;
  ParameterTable& table_;
  OptimizerOptions options_;
  std::map<Role, std::unique_ptr<Rule>> rules_;
  std::vector<Row> rows_;
  std::vector<Batch> batches_;
  Arena arena_{"optimizer state"};
};
