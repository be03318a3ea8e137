// What the ranks of a step agree on, in one exchange: ||g||_2, the clip factor, whether all gradients are
// finite, the numbers that steps are measured by (Measured), and what the caller shares.
//
// Gradients are complete at their owners only: each rank squares its own pieces, the others' count 0.
// Afterwards every rank has the same bits, and where one piece is not finite no rank moves. Of the measured
// numbers the exchange carries
//
//   escape velocity, prodigy   those of the step before. They make the next eta, which nobody needs before
//                              that exchange. A checkpoint asks for the sum of the last step's: total().
//   sharpness                  the step's own. Directions are made first, weights wait for the exchange
//                              anyway. A rank then knows of its own pieces alone that gradients are finite
//                              (guess()): a copy of its state lies aside, and comes back where one elsewhere
//                              is not.
//
// Two kinds of steps need a second exchange, total(), because its numbers depend on what the first one says:
//
//   sharpness, clipping        and a rule that remembers gradients: ||beta m + (1 - beta) c g||^dual follows
//                              from no number that is known before the clip factor c. Where nothing is
//                              remembered all is in proportion to c (Rule::scale_free), and one is enough.
//   prodigy:variant=package    moves by the new eta at once, and that needs ||b3 s + gain c g||_1.
//
//   each step:   square(); guess() and directions, or not; agree(); directions, or not; mark()
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "model/kernels/readback.h"
#include "optim/escape.h"

class Agreement {
 public:
  /// On the squares of so many pieces; with `measured` on a Measured, which waits for a GPU. Plans its memory
  /// in `arena`; `clip` is the largest norm, 0: no clipping.
  Agreement(Context& ctx, Arena& arena, int64_t pieces, double clip, bool measured);
  Agreement(const Agreement&) = delete;
  Agreement& operator=(const Agreement&) = delete;
  /// Call when the arena has its memory.
  void allocate();
  /// Small f64 tensors where ctx computes, summed in every agree().
  void share(std::vector<Tensor> tensors) { shared_ = std::move(tensors); }

  /// Squares the gradients of all pieces, those of other ranks empty.
  void square(std::span<const Tensor> gradients);
  /// Until agree(), a factor of 1, or NaN where one of these gradients is not finite.
  void guess() { set_factor(0); }
  /// The exchange. Returns the sum of `own` where steps are measured.
  Measured agree(const Measured& own);
  /// The sum over all ranks, in an exchange of its own. Waits, on the host.
  Measured total(const Measured& own) const;

  /// (1): what gradients are multiplied by; NaN when one is not finite.
  const Tensor& factor() const { return factor_; }
  /// The same on the host. Waits.
  double factor_here() const;
  /// Marks the last agree(), for norms().
  int64_t mark() { return readback_->mark(); }
  /// Waits for it: the sum of squares of each piece, then ||g||_2 before clipping.
  std::span<const double> norms(int64_t ticket) { return readback_->wait(ticket); }

 private:
  void set_factor(double limit);

  Context& ctx_;
  const int64_t pieces_;
  const double clip_;
  const bool measured_;
  std::vector<Tensor> shared_;
  Tensor totals_;                       // (pieces + 1) f64: each one's sum of squares, then ||g||_2
  Tensor numbers_;                      // (2) f64: a Measured
  Tensor factor_;                       // (1)
  std::unique_ptr<Readback> readback_;  // of totals_
};
