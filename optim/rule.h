// A rule turns gradients into update directions. The optimizer then applies every direction u in the same
// way:
//
//   W <- W - lr wd W - (lr / s) u            lr: after the schedule; wd: decoupled decay; s: sensitivity
//
// A rule is a point in norm x smoothing (DESIGN.md section 3): it smooths the gradient over time, and returns
// the *dual vector* of the result, u = argmax <G, T> over ||T|| = 1 (Proposition 1 of arXiv 2409.20325). Some
// rules bend this on purpose and say so in their file.
//
// Instead of a schedule, the step size may come from the gradients: by a sharpness (Proposition 7) or by the
// escape velocity (Prodigy, eq. 28, for any norm). Both need to know what was dualized: Measured.
//
// To add one: copy rule_lion.cpp, add one line to the table in rule.cpp (dev/new_rule_or_norm.md). That is
// all; options, state, checkpoints, `info` and the tests that run over all rules follow from the table.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "keyed.h"
#include "model/kernels/context.h"
#include "model/kernels/tensor.h"
#include "optim/escape.h"
#include "optim/norm.h"
#include "optim/update.h"

/// One matrix or vector that a rule treats as a whole. A fused q, k, v parameter (3 C, C) is three blocks (C,
/// C).
struct Block {
  Tensor weight;              // (out, in), or (in, out) in a transposed group, or (n)
  Tensor grad;                // same shape; the gradient before direction(), the update direction u after
  std::vector<Tensor> state;  // in the order of Rule::state(); zero before the first step
  Tensor compute = {};        // bf16 copy of the weight that products read; absent when they read the weight
  Tensor anchor = {};         // the weight before the first step; absent unless an escape velocity needs it
  Tensor lengths = {};        // those of grad that the rule asks for; absent: not known
};

/// The gradients of some blocks.
std::vector<Tensor> grads_of(std::span<const Block> blocks);

/// All blocks of one shape under one rule: they are processed together.
struct Group {
  Shape shape;              // of every block
  bool transposed = false;  // stored (in, out): embeddings; the paper's column j is storage row j
  std::vector<Block> blocks;
  DType dtype = DType::f32;  // of weights, gradients and state; f64 is for tests of the arithmetic

  bool is_matrix() const { return shape.rank() == 2; }
  int64_t out() const { return transposed ? shape[1] : shape[0]; }                           // d_out
  int64_t in() const { return shape.rank() == 1 ? 1 : (transposed ? shape[0] : shape[1]); }  // d_in
};

/// A tensor of state that a rule keeps for each block.
struct StateSpec {
  std::string name;  // "m", "v": checkpoints call it "<parameter>.<name>"
  Shape shape;       // of one block; the blocks of a parameter are stacked along the first dimension
};

/// How a rule that fuses() moves the weights itself: apply_update's numbers.
struct Applying {
  double step = 0;        // lr / s
  double decay = 0;       // lr * weight_decay
  bool cautious = false;  // decay only where u and W have the same sign
};

/// What a rule is told about the step.
struct RuleStep {
  int64_t t = 1;           // step number, counted from 1 (bias correction needs that)
  Tensor grad_scale = {};  // (1) f32: multiply every gradient by this first, global clipping folded in; NaN:
                           // leave the state alone, the directions do not matter; absent: 1
  bool clips = false;      // grad_scale can be another number than 1
  bool measure = false;  // return Measured; directions are then true dual vectors. `along` leaves out blocks
                         // without an anchor
  double lr = 0;         // after the schedule
  double eta = 0;        // escape velocity now, for rules that escape()
  double next_eta = 0;   // and after this step's prepare(), for rules that need it: needs_next_eta()
  double first_eta = 0;  // before the first step
  const Applying* apply = nullptr;  // move the weights, too; grad is then spent. Only for rules that fuse()
};

/// The weight of `block` as what an operation moves in the same pass; absent unless step.apply.
ApplyTo weight_of(const Block& block, const RuleStep& step);

class Rule {
 public:
  /// Reads the keys that all rules have: lr, wd, cautious, s, hyperball. A subclass reads its own; make_rule
  /// rejects the rest.
  Rule(Keyed& keys, double default_lr, double default_decay = 0);
  virtual ~Rule() = default;

  double lr() const { return lr_; }                      // step size before the schedule
  double weight_decay() const { return weight_decay_; }  // decay is lr * weight_decay per step
  bool cautious() const { return cautious_; }            // decay only where u and W have the same sign
  double sensitivity() const { return sensitivity_; }    // s of Proposition 7
  bool hyperball() const { return hyperball_; }          // keep ||W||_F as it began: hyperball.h

  /// The norm whose dual vectors the directions are, or are closest to.
  virtual Norm norm() const = 0;
  /// The same for people, with what bends it: "l1-linf, smoothed".
  virtual std::string describe() const { return norm_name(norm()); }
  /// True when the rule means nothing for vectors.
  virtual bool matrices_only() const { return false; }
  /// True when direction() waits for a GPU, always or at some steps.
  virtual bool waits() const { return false; }
  /// True when direction() can move the weights in the same pass over memory: see RuleStep::apply.
  virtual bool fuses() const { return false; }
  /// True when, in such a group, the direction of every row of storage and all state of that row depend on
  /// that row alone, however many rows there are: a block may then be cut between rows, a rank owning each
  /// part. If steps are `measured` (RuleStep::measure, prepare()), the numbers of the whole must also be the
  /// sums of the rows'. Never with hyperball, which is a length of the whole.
  bool rows_apart(const Group& group, bool measured) const {
    return !hyperball_ && treats_rows_apart(group, measured);
  }
  /// FLOPs of one step on one block, the mean over steps: what ranks share out evenly (owners.h). Estimates
  /// from the sizes alone; what moves every entry once counts little beside products.
  virtual double work(const Group& group) const;
  /// Of a rule that sets and uses the escape velocity by itself, through prepare(): Prodigy. Its lr is
  /// multiplied by the velocity.
  virtual std::optional<EscapeOptions> escapes() const { return std::nullopt; }
  /// True of these when direction() uses RuleStep::next_eta, so that steps wait for it.
  virtual bool needs_next_eta() const { return false; }
  /// True when nothing is remembered of gradients, directions of c times the gradients, c > 0, are those of
  /// the gradients themselves, and what is measured is c times as large.
  virtual bool scale_free(const Group& group) const {
    (void)group;
    return false;
  }
  /// State per block of a group; its blocks need not be filled in.
  virtual std::vector<StateSpec> state(const Group& group) const = 0;
  /// The Euclidean lengths of the gradient that direction() divides by. A step takes them while it measures
  /// ||g||_2, so that the gradient is read twice and not three times: Block::lengths, of the gradient as it
  /// is, not multiplied by grad_scale.
  virtual Lengths lengths(const Group& group) const {
    (void)group;
    return Lengths::none;
  }
  /// Scratch that prepare() and direction() take from ctx.scratch.
  virtual int64_t scratch_bytes(const Context& ctx, const Group& group) const;
  /// Of rules that escape(): called for all groups before any direction(), updates the state and returns the
  /// numerator (along) and the denominator (dual) of the next escape velocity. What does not depend on that
  /// may be left to direction(), whose numbers are added to these.
  virtual Measured prepare(Context& ctx, Group& group, const RuleStep& step) const;
  /// Updates the state and replaces every block's grad by its update direction. Each block's result depends
  /// on that block alone (but for rounding, see polar.h). Only enqueues work, unless step.measure or waits().
  virtual Measured direction(Context& ctx, Group& group, const RuleStep& step) const = 0;

 private:
  virtual bool treats_rows_apart(const Group& group, bool measured) const;

  double lr_, weight_decay_, sensitivity_;
  bool cautious_, hyperball_;
};

/// The smoothing over time that most rules offer. With g the (clipped) gradient:
///   ema        m <- beta m + (1 - beta) g       nesterov: beta m + (1 - beta) g   else: m
///   otherwise  m <- beta m + g                  nesterov: beta m + g              else: m
///   look       instead of those, the old m another way: look m + (1 - look) g, as Lion does
/// beta = 0 keeps no state and returns g.
struct Smoothing {
  double beta = 0;
  bool nesterov = false;
  bool ema = true;
  std::optional<double> look = {};  // excludes nesterov; without effect when beta = 0
  /// {"m"} when there is something to remember.
  std::vector<StateSpec> state(const Shape& block) const;
  /// The operation for one block, its gradient in place; state[0] is m.
  Smooth operation(const Block& block, const RuleStep& step) const;
  /// Replaces every block's gradient by its smoothed value.
  void apply(Context& ctx, std::span<const Block> blocks, const RuleStep& step) const;
  /// The smoothed values for those who only read them, the clip factor left out where nothing is remembered:
  /// m itself where it is the smoothed value, else the gradients, which are replaced.
  std::vector<Tensor> smoothed(Context& ctx, std::span<const Block> blocks, const RuleStep& step) const;
  /// The same into `to` (blocks, ...), f32 or on a GPU bf16; the gradients stay.
  void apply_to(Context& ctx, const Tensor& to, std::span<const Block> blocks, const RuleStep& step) const;
};

/// (1): 1, or NaN where step.grad_scale is: the `scale` for state that is made of other things than gradients
/// and must stay as it is while those are not finite. Absent when step.grad_scale is. Takes scratch that
/// lives as long as the frame, guard_scratch_bytes().
Tensor guard_of(Context& ctx, Scratch::Frame& frame, const RuleStep& step);
constexpr int64_t guard_scratch_bytes() {
  return 64;
}

/// The Measured of blocks whose grad holds what will be dualized under `norm`. Waits.
Measured measure(Context& ctx, const Norm& norm, const Group& group);
/// The `along` of some blocks alone. Waits.
double measure_along(Context& ctx, std::span<const Block> blocks);

/// What the key hyperball does after direction() (hyperball.h), to blocks whose last state is R; `lr` is what
/// the directions will be multiplied by. Moves the weights where step.apply says so.
void stay_on_ball(Context& ctx, std::span<const Block> blocks, const RuleStep& step, double lr);
int64_t ball_scratch_bytes(const Context& ctx, const Group& group);

/// body(blocks) for all of these, `most` at a time; the sum of what it measures.
template <typename Body>
Measured some_at_a_time(std::span<const Block> all, int64_t most, const Body& body) {
  const auto step = static_cast<size_t>(most);
  Measured measured;
  for (size_t i = 0; i < all.size(); i += step)
    measured += body(all.subspan(i, std::min(step, all.size() - i)));
  return measured;
}

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
