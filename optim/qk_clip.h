// QK clip, of "MuonClip": attention logits that grow beyond a threshold are brought back by shrinking the
// weights that make them, head by head.
//
//   where S = largest[h] > tau, with gamma = tau / S:   rows of head h of q *= gamma^alpha
//                                                       rows of head h of k *= gamma^(1 - alpha)
//
// A logit is scale (W_q x + b_q).(W_k x' + b_k): with weights and biases scaled so, all logits of the head
// are gamma times what they would have been on the same x. Heads with S <= tau keep their bits, and so do
// those whose S is not finite: a NaN shows in the loss.
//
// Source: "Kimi K2: Open Agentic Intelligence", arXiv 2507.20534, section 2.1 and Algorithm 1: after the
// optimizer's update, S is the largest logit in the forward passes of the step before it; tau 100, alpha 0.5.
// It has no biases; GPT-2 has, and they are part of the logit.
//
// With several ranks: the maxima must be those over all ranks, and the clip comes between the optimizer's
// step and the journey of the owners' new weights to the others. Then every weight is clipped once, by its
// owner and with its float32 master; what the others have clipped is overwritten.
//
// Class QkClip does this for a whole model. Nobody waits: the maxima stay where the model computes, and what
// is logged of them follows by a Readback.
//
//   each step:   ... forward and backward passes, which leave the maxima ...   optimizer.step(...);
//                clip.step(optimizer.guard());       // may be captured into a CUDA graph
//                const int64_t ticket = clip.mark(); // after the launch of that graph
//                ... clip.max_logit(ticket of the step before) ...
//
// With several ranks S is the largest over the rows of all of them: every rank clips with the same numbers
// what its optimizer has moved, before the new weights travel (exchange.h).
//
// Deterministic. The maxima come from head_max (model/kernels/head_max.h), (L, NH) of them.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "model/kernels/context.h"
#include "model/kernels/readback.h"
#include "model/parameters.h"

/// One tensor whose rows are those of q, k and v, one below the other, as in GPT-2, or of some of these, next
/// to each other; inside each, head h owns C / NH rows. Nothing overlaps.
struct QkClipRows {
  Tensor x;           // (count C, C) weight or (count C) bias, f32, updated
  int first = 0;      // what x begins with: 0 q, 1 k, 2 v
  int count = 3;      // how many of them it has
  Tensor copy = {};   // bf16, written where x is: the new x, rounded to nearest, ties to even; absent: none
  Tensor largest;     // (NH) f64: S of each head
  float tau;          // > 0
  float alpha;        // q's share, in [0, 1]
  Tensor guard = {};  // (1): nothing is written when it is NaN; absent: never
};

namespace cpu {
void qk_clip(Context& ctx, std::span<const QkClipRows> list);
}  // namespace cpu
namespace gpu {
void qk_clip(Context& ctx, std::span<const QkClipRows> list);
}  // namespace gpu

/// Nothing but the maxima, when nothing is to be clipped.
inline Work work(std::span<const QkClipRows> list) {
  Work sum;
  for (const QkClipRows& a : list) sum.bytes += static_cast<double>(a.largest.bytes());
  return sum;
}

/// Any number of tensors, in as few kernel launches as their arguments fit into.
inline void qk_clip(Context& ctx, std::span<const QkClipRows> list) {
  for (const QkClipRows& a : list) {
    expect(a.first >= 0 && a.count >= 1 && a.first + a.count <= 3, "qk_clip: x has rows of q, k and v");
    expect(a.largest.size() > 0 && a.x.shape[0] % (a.count * a.largest.size()) == 0,
           "qk_clip: the rows of x must be those of q, k and v of every head");
    expect(!a.copy || a.copy.size() == a.x.size(), "qk_clip: x and copy differ in size");
    expect(a.tau > 0 && a.alpha >= 0 && a.alpha <= 1, "qk_clip: need tau > 0 and alpha in [0, 1]");
  }
  ON_DEVICE(qk_clip, ctx, list);
}

struct QkClipOptions {
  double tau = 0;      // largest logit, as softmax sees it; 0: no clipping
  double alpha = 0.5;  // q's share of the shrinking, in [0, 1]

  bool on() const { return tau > 0; }
  /// "100:alpha=0.5", which parse_qk_clip reads back; empty when off.
  std::string str() const;
};
/// Reads "TAU[:alpha=A]"; empty is off. Throws UsageError naming what would be legal. `option` is what the
/// user typed it after ("--qk-clip").
QkClipOptions parse_qk_clip(const std::string& option, const std::string& text);

/// QK clip of every layer of a model.
class QkClip {
 public:
  /// `max_logits`, (L, NH) f64, is where the model leaves the largest logits of a step. Call when the table
  /// has its memory; the table must outlive this.
  QkClip(Context& ctx, ParameterTable& table, const Tensor& max_logits, const QkClipOptions& options);

  /// Enqueues the clipping of all layers and a readback of the maxima. `guard` as above.
  void step(const Tensor& guard);
  /// Marks the last step as enqueued, for max_logit().
  int64_t mark() { return readback_.mark(); }
  /// Waits for that step: its largest logit over layers and heads, before the clipping. NaN when one is. To
  /// be asked before the second next step is enqueued.
  double max_logit(int64_t ticket);

 private:
  void take_maxima_of_all_ranks();

  Context& ctx_;
  Tensor max_logits_;
  Arena arena_{"largest logits"};
  Tensor of_ranks_;               // (N, L NH, 1) f32: the maxima of each rank; absent with one
  std::vector<QkClipRows> rows_;  // weight and bias of every layer, as far as this rank has them
  Readback readback_;
};
