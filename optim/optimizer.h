// The optimizer: gives every tensor of the parameter table a rule by its role or its name, and makes the
// steps.
//
// One step, with gradients in Parameter::grad:
//   1. ||g||_2 over all tensors, and the lengths that rules ask for, with one reading of gradients.
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
// With several ranks (ctx.comm) every rank makes the same calls and owns some pieces of the parameters
// (owners.h): it keeps state for them alone, reads their gradients alone, which must be complete there, and
// moves their weights alone. Gradients come to their owners before a step and new weights go to the others
// after it; that is the caller's, who finds the pieces in owners(). What a step needs of all ranks it asks
// for itself, in one exchange, or where its numbers depend on each other in two: agreement.h.
//
// Results are those of one process but for rounding: sums of squares and of measured numbers are taken by
// pieces, and batches of matrices are others.
//
// Deterministic for a given number of threads and ranks; no memory of tensors is allocated in step().
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "model/parameters.h"
#include "model/safetensors.h"
#include "optim/agreement.h"
#include "optim/assign.h"
#include "optim/describe.h"
#include "optim/owners.h"

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

class Optimizer {
 public:
  /// Assigns rules (assign_rules(), UsageError) and shares out the tensors among the ranks of ctx.comm, which
  /// it tells the table (keep_masters()); no memory yet. `table` must outlive the optimizer.
  Optimizer(Context& ctx, ParameterTable& table, const OptimizerOptions& options);
  ~Optimizer();

  /// Who owns what; parameters are counted in the order of the table.
  const Owners& owners() const { return owners_; }
  /// The same, as the table and checkpoints want it.
  std::vector<OwnedRows> owned_rows() const;

  /// Takes the memory of the state that this rank keeps and reserves ctx.scratch. Call after
  /// table.allocate().
  void allocate();
  /// Small f64 tensors where ctx computes that every step() from now on also sums over all ranks, in the
  /// exchange that it makes anyway: the loss. They must hold this rank's values when step() is called, and
  /// hold the sums after it. Replaces those given before.
  void share(std::vector<Tensor> tensors) { agreement_.share(std::move(tensors)); }

  /// Told in step() of parameters (indices into the table) whose new weights are final, or enqueued, on their
  /// owners: each once, in the same order on all ranks, also on those that own nothing of them.
  void on_moved(std::function<void(std::span<const size_t> parameters)> moved) { moved_ = std::move(moved); }

  /// Makes, or on a GPU enqueues, step t (counted from 0) of `total`. Afterwards Parameter::grad holds the
  /// directions if `keep_directions`, otherwise nothing in particular; with several ranks those of the own
  /// pieces.
  void step(int64_t t, int64_t total, bool keep_directions = false);
  /// False when a step waits for the GPU: with a sharpness or an escape velocity (which come from dual norms,
  /// on the host), with a rule that waits(), with exchanges that wait, or with a profile.
  bool capturable() const;
  /// How the last step moved each parameter, in the order of the table.
  std::vector<RowStep> last_steps() const;

  /// (1), where ctx computes: NaN when the last step's gradient was not finite, so that the step changed
  /// nothing. Whoever changes weights after a step does as update.h does with its `guard`.
  const Tensor& guard() const { return agreement_.factor(); }

  /// Marks the last step as enqueued, for report().
  int64_t mark();
  /// Waits for that step and says what it did; to be asked before the second next step is enqueued. Throws
  /// RunError naming the tensor and the step when a gradient was not finite: on every rank the same.
  StepReport report(int64_t ticket);
  /// The last step's report.
  StepReport report() { return report(mark()); }

  /// The whole state that a resumed run needs besides weights and step number; the tensors may be written to.
  /// They are where ctx computes. Names are "<parameter>.<state>", e.g. "h.0.mlp.c_fc.weight.m"; shapes are
  /// logical, without padding. A tensor whose parameter belongs to several ranks comes in pieces, in the
  /// order of their rows; those of other ranks have no data. The list is the same on all ranks, and so is
  /// what it says of the whole tensors for any number of ranks. "escape_velocity" is whole, the same on all;
  /// where there is one, all ranks ask together.
  std::vector<NamedTensor> state();
  /// Of this rank.
  int64_t state_bytes() const { return arena_.bytes(); }
  int64_t scratch_bytes() const;
  /// How every tensor is updated, shared out among so many ranks; 0: those that there are.
  std::vector<RowInfo> describe(int ranks = 0) const;
  /// The most that any of so many ranks has of each.
  RankInfo most_of_a_rank(int ranks) const;
  /// What falls to each of so many ranks, as a table.
  std::string describe_ranks(int ranks = 0) const;

 private:
  struct Shard;  // one piece, with its state where it is this rank's
  struct Batch;  // one Group, with its rule and sensitivity
  /// What a step multiplies the rules' lr with, or takes in their place.
  struct Rates {
    double multiplier = 0;             // of the schedule
    double eta = 0;                    // the escape velocity; 0 without one
    std::optional<double> sharp = {};  // of a sharpness, once the dual norms are known
  };
  /// What the host knows about a step when it is enqueued.
  struct Enqueued {
    int64_t t = 0;
    double lr = 0, eta = 0;
  };
  bool mine(const Piece& piece) const { return piece.owner == ctx_.comm->rank(); }
  const AssignedRule& row_of(const Shard& shard) const;
  void plan_state();
  void plan_memory();
  size_t batch_for(const Piece& piece);
  void add_blocks(const Shard& shard);
  void keep_anchors();
  void measure_gradients();
  enum class Copy : uint8_t { aside, back };
  void copy_state(Copy to);
  bool measures_first() const { return assignment_.measures_first && !ctx_.comm->alone(); }
  bool needs_next_eta() const;
  Measured agree_late(const Measured& own);
  void settle(const Measured& all);
  Measured prepare(const RuleStep& step);
  Measured directions(const RuleStep& step, bool keep_directions);
  Measured direction(Batch& batch, RuleStep step);
  void apply(const Batch& batch);
  double lr_of(const Rule& rule) const;
  NamedTensor named(const Shard& shard, const std::string& suffix, const Tensor& value);

  Context& ctx_;
  OptimizerOptions options_;
  Assignment assignment_;
  Owners owners_;
  std::vector<Shard> shards_;  // of all pieces
  std::vector<Batch> batches_;
  std::optional<EscapeVelocity> escape_;
  Arena arena_{"optimizer state"};
  Agreement agreement_;
  // What is squared of the shards for ||g||_2: the gradient, or the lengths that it consists of; empty where
  // they are another rank's.
  std::vector<Tensor> squared_;
  std::function<void(std::span<const size_t>)> moved_;  // of on_moved()
  Measured unsettled_;    // of the last step, this rank's: not yet part of escape_
  Rates rates_;           // of the last step
  Enqueued enqueued_[2];  // by ticket, in turn
  int64_t next_ticket_ = 0;
};
