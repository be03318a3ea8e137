// The optimizer: gives every tensor of the parameter table a rule by its role or its name, and makes the
// steps.
//
// One step, with gradients in Parameter::grad:
//   1. ||g||_2 over all tensors.
//   2. Clipping: all gradients times min(1, grad_clip / ||g||_2), folded into what comes next.
//   3. Every group of equal blocks: its rule replaces gradients by update directions u (rule.h).
//   4. W <- W - lr wd W - (lr / s) u for every tensor, where lr is the schedule's multiplier times the rule's
//   lr;
//      or one eta for all in the place of lr: by a sharpness (Proposition 7, modular.h) or the escape
//      velocity (escape.h). Where products read a bf16 copy of W (Parameter::compute), it is rounded from the
//      new W in the same pass. Rules that fuse() make 3 and 4 one pass over memory.
// Afterwards Parameter::grad holds the directions; the caller clears it before the next backward pass.
//
// On a GPU a step only enqueues this and nobody waits: the norm and the clip factor stay there, and a report
// of them follows. A gradient that is not finite therefore shows late. Until then the step that had it, and
// every one that has it again, changes neither weights nor state; its report throws.
//
//   each step:   optimizer.step(t, total);               // may be captured into a CUDA graph: capturable()
//                const int64_t ticket = optimizer.mark();            // after the launch of that graph
//                ... report(ticket of the step before) ...
//   or simply:   optimizer.step(t, total);   optimizer.report();
//
// Deterministic for a given number of threads; no memory of tensors is allocated in step().
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "model/kernels/readback.h"
#include "model/parameters.h"
#include "model/safetensors.h"
#include "optim/rule.h"
#include "optim/schedule.h"

/// A rule for the tensors of some name, before that of their role: "h.*.mlp.c_proj" -> "muon:lr=0.04".
struct RuleOverride {
  std::string pattern;  // name_matches() in sensitivity.h
  std::string rule;
};

struct OptimizerOptions {
  std::map<Role, std::string>
      rules;  // role -> "NAME:key=value,..."; a role that the model has must be present
  std::vector<RuleOverride> overrides = {};     // the last one that matches holds
  std::vector<std::string> sensitivities = {};  // read_sensitivities()
  Schedule schedule = {};
  double grad_clip = 0;  // largest global gradient norm; 0: no clipping
  double sharpness = 0;  // lambda of Proposition 7; 0: the step size is each rule's lr. When > 0 the
                         // rules' lr are not used: eta comes from the dual norms of the gradient
  std::optional<EscapeOptions> escape = {};  // eta is the escape velocity, the rules' lr are not used either
};

/// What a step did, for the log.
struct StepReport {
  int64_t step = 0;       // t of Optimizer::step
  double grad_norm = 0;   // ||g||_2 over all tensors, before clipping
  double clip_scale = 1;  // what gradients were multiplied by
  double lr = 0;          // the hidden rule's lr after the schedule, or eta in its place
  double eta = 0;         // the escape velocity that the step was made with; 0 without one
};

/// How the last step moved one parameter: dW = -step u - decay W.
struct RowStep {
  const Parameter* parameter;
  Norm norm;           // of its rule
  double step;         // lr / s
  double sensitivity;  // s
};

/// How one parameter is updated, for `info`.
struct RowInfo {
  std::string parameter;
  Role role;
  std::string rule;  // what the user wrote, "muon:lr=0.02"
  std::string norm;  // "rms-rms"
  std::string by;    // what gave it the rule: "hidden", or the pattern
  int matrices;      // blocks that the rule sees
  double lr;
  double weight_decay;
  double sensitivity;
  int64_t state_bytes;
};

class Optimizer {
 public:
  /// Assigns rules; no memory yet. Throws UsageError for a bad rule, a missing role, a pattern without a
  /// tensor, a rule that needs matrices given to vectors, or step sizes that exclude each other. `table` must
  /// outlive the optimizer.
  Optimizer(Context& ctx, ParameterTable& table, const OptimizerOptions& options);
  ~Optimizer();

  /// Takes the memory of the state and reserves ctx.scratch. Call after table.allocate().
  void allocate();
  /// Makes, or on a GPU enqueues, step t (counted from 0) of `total`. Afterwards Parameter::grad holds the
  /// directions if `keep_directions`, otherwise nothing in particular.
  void step(int64_t t, int64_t total, bool keep_directions = false);
  /// False when a step waits for the GPU: with a sharpness or an escape velocity (which come from dual norms,
  /// on the host), with a rule that waits(), or with a profile.
  bool capturable() const;
  /// How the last step moved each parameter, in the order of the table.
  std::vector<RowStep> last_steps() const;

  /// (1), where ctx computes: NaN when the last step's gradient was not finite, so that the step changed
  /// nothing. Whoever changes weights after a step does as update.h does with its `guard`.
  const Tensor& guard() const { return grad_scale_; }

  /// Marks the last step as enqueued, for report().
  int64_t mark();
  /// Waits for that step and says what it did; to be asked before the second next step is enqueued. Throws
  /// RunError naming the tensor and the step when a gradient was not finite.
  StepReport report(int64_t ticket);
  /// The last step's report.
  StepReport report() { return report(mark()); }

  /// The whole state that a resumed run needs besides weights and step number; the tensors may be written to.
  /// They are where ctx computes.
  /// Names are "<parameter>.<state>", e.g. "h.0.mlp.c_fc.weight.m"; shapes are logical, without padding.
  std::vector<NamedTensor> state();
  int64_t state_bytes() const { return arena_.bytes(); }
  int64_t scratch_bytes() const;
  std::vector<RowInfo> describe() const;

 private:
  struct Row;    // one parameter: its rule and state
  struct Batch;  // one Group, with its rule and sensitivity
  /// What the host knows about a step when it is enqueued.
  struct Enqueued {
    int64_t t = 0;
    double lr = 0, eta = 0;
  };
  const Rule* add_rule(const std::string& option, const std::string& text);
  void assign_rules();
  void check_step_sizes();
  void plan_state();
  size_t batch_for(const Row& row);
  void keep_anchors();
  bool measured() const { return options_.sharpness > 0 || options_.escape.has_value(); }
  Measured prepare(const RuleStep& step);
  Measured directions(RuleStep step, bool keep_directions);
  void apply();
  double multiplied_lr(const Rule& rule, double multiplier, double eta) const;

  Context& ctx_;
  ParameterTable& table_;
  OptimizerOptions options_;
  std::vector<std::unique_ptr<Rule>> rules_;
  std::vector<Row> rows_;
  std::vector<Batch> batches_;
  std::optional<EscapeVelocity> escape_;
  Arena arena_{"optimizer state"};
  std::vector<Tensor> grads_;           // of the rows
  Tensor totals_;                       // (rows + 1) f64: each row's sum of squares, then ||g||_2
  Tensor grad_scale_;                   // (1): the clip factor, NaN when ||g||_2 is not finite
  std::unique_ptr<Readback> readback_;  // of totals_
  Enqueued enqueued_[2];                // by ticket, in turn
  int64_t next_ticket_ = 0;
};
