// A rule turns gradients into update directions. The optimizer then applies every direction u in the same
// way:
//
//   W <- W - lr wd W - (lr / s) u            lr: after the schedule; wd: decoupled decay; s: sensitivity
//
// A rule is a point in norm x smoothing (DESIGN.md section 3): it smooths the gradient over time, and returns
// the *dual vector* of the result, u = argmax <G, T> over ||T|| = 1 (Proposition 1 of arXiv 2409.20325). Two
// rules bend this on purpose and say so: `sgd` without normalize, and `adam`.
//
// To add one: copy rule_sign.cpp, add one line to the table in rule.cpp. That is all; options, state,
// checkpoints, `info` and the tests that run over all rules follow from the table.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "keyed.h"
#include "model/kernels/context.h"
#include "model/kernels/tensor.h"

/// One matrix or vector that a rule treats as a whole. A fused q, k, v parameter (3 C, C) is three blocks (C,
/// C).
struct Block {
  Tensor weight;              // (out, in), or (in, out) in a transposed group, or (n)
  Tensor grad;                // same shape; the gradient before direction(), the update direction u after
  std::vector<Tensor> state;  // in the order of Rule::state(); zero before the first step
};

/// All blocks of one shape under one rule: they are processed together.
struct Group {
  Shape shape;              // of every block
  bool transposed = false;  // stored (in, out): embeddings; the paper's column j is storage row j
  std::vector<Block> blocks;

  bool is_matrix() const { return shape.rank() == 2; }
  int64_t out() const { return transposed ? shape[1] : shape[0]; }                           // d_out
  int64_t in() const { return shape.rank() == 1 ? 1 : (transposed ? shape[0] : shape[1]); }  // d_in
};

/// A tensor of state that a rule keeps for each block.
struct StateSpec {
  std::string name;  // "m", "v": checkpoints call it "<parameter>.<name>"
  Shape shape;       // of one block; the blocks of a parameter are stacked along the first dimension
};

/// What a rule is told about the step.
struct RuleStep {
  int64_t t = 1;           // step number, counted from 1 (bias correction needs that)
  Tensor grad_scale = {};  // (1) f32: multiply every gradient by this first, global clipping folded in; NaN:
                           // leave the state alone, the directions do not matter; absent: 1
  bool clips = false;      // grad_scale can be another number than 1
  bool want_dual = false;  // steepest descent by sharpness: return true dual vectors and the dual norm
};

class Rule {
 public:
  /// Reads the keys that all rules have: lr, wd, cautious, s. A subclass reads its own; make_rule rejects the
  /// rest.
  Rule(Keyed& keys, double default_lr);
  virtual ~Rule() = default;

  double lr() const { return lr_; }                      // step size before the schedule
  double weight_decay() const { return weight_decay_; }  // decay is lr * weight_decay per step
  bool cautious() const { return cautious_; }            // decay only where u and W have the same sign
  double sensitivity() const { return sensitivity_; }    // s of Proposition 7

  /// The norm whose dual vectors this rule returns, for people: "RMS->RMS", "l1->linf".
  virtual std::string norm_name() const = 0;
  /// True when the rule means nothing for vectors.
  virtual bool matrices_only() const { return false; }
  /// True when direction() computes on the host in every build, so that a GPU waits for it.
  virtual bool on_host() const { return false; }
  /// State per block of this shape.
  virtual std::vector<StateSpec> state(const Shape& block) const = 0;
  /// Scratch that direction() takes from ctx.scratch.
  virtual int64_t scratch_bytes(const Context& ctx, const Group& group) const;
  /// Updates the state and replaces every block's grad by its update direction. Each block's result depends
  /// on that block alone (but for rounding, see polar.h). Returns the sum of the blocks' dual norms of what
  /// was dualized if step.want_dual, else 0. Only enqueues work, unless want_dual or on_host().
  virtual double direction(Context& ctx, Group& group, const RuleStep& step) const = 0;

 private:
  double lr_, weight_decay_, sensitivity_;
  bool cautious_;
};

/// The smoothing over time that most rules offer. With g the (clipped) gradient:
///   ema        m <- beta m + (1 - beta) g       nesterov: beta m + (1 - beta) g   else: m
///   otherwise  m <- beta m + g                  nesterov: beta m + g              else: m
/// beta = 0 keeps no state and returns g.
struct Smoothing {
  double beta = 0;
  bool nesterov = false;
  bool ema = true;
  /// {"m"} when there is something to remember.
  std::vector<StateSpec> state(const Shape& block) const;
  /// Replaces every block's gradient by its smoothed value; state[0] is m.
  void apply(Context& ctx, std::span<const Block> blocks, const RuleStep& step) const;
  /// The same into `to` (blocks, ...), f32 or on a GPU bf16; the gradients stay.
  void apply_to(Context& ctx, const Tensor& to, std::span<const Block> blocks, const RuleStep& step) const;
};
/// Reads the keys momentum, nesterov and ema.
Smoothing read_smoothing(Keyed& keys, const Smoothing& fallback);

/// One line of the table of rules.
struct RuleEntry {
  const char* name;
  const char* help;  // one line
  std::unique_ptr<Rule> (*make)(Keyed& keys);
};
std::span<const RuleEntry> rule_table();

/// Makes the rule of "NAME[:key=value,...]", e.g. ("--hidden", "muon:lr=0.02,momentum=0.95"). Throws
/// UsageError.
std::unique_ptr<Rule> make_rule(const std::string& option, const std::string& text);
