// The escape velocity: a step size that grows by itself until the weights have left the region around their
// start where the loss is linear (Story III of arXiv 2409.20325). Prodigy without moving averages is sign
// descent with it (eqs. 28, 29); the same works under any modular norm (Proposition 7):
//
//   eta' = max(eta, sum_l <G_l, W_0l - W_l> / sum_l (||G_l||_l^dual / s_l))
//   dW_l = -(eta / s_l) dualize_l(G_l)
//
// The numerator is how far the whole way travelled, W_l - W_0l, still goes downhill; the denominator is the
// largest that it could be for a way of unit length in the modular norm. So eta' never passes the way
// travelled, max_l s_l ||W_l - W_0l||_l (Hoelder), and on a convex loss never max(eta_0, max_l s_l ||W_0l -
// W_l*||_l), the distance to a solution. On a linear loss with exact dual vectors the way travelled is eta_0
// times the Fibonacci numbers, so eta grows by the golden ratio a step. The first increase comes after the
// second gradient. Never shrinks.
//
// Where a rule smooths gradients, G_l is what it dualizes. After the schedule's multiplier.
#pragma once

#include <array>
#include <limits>
#include <string>

#include "model/kernels/tensor.h"

/// Sums over tensors: of <m, W_0 - W> and of the dual norms of m, with m what was dualized.
struct Measured {
  double dual = 0;   // each divided by its tensor's sensitivity where sums run over tensors
  double along = 0;  // how far the way travelled still goes downhill
  Measured& operator+=(const Measured& other) {
    dual += other.dual;
    along += other.along;
    return *this;
  }
};

struct EscapeOptions {
  double first = 1e-6;                                      // eta_0, far too small
  double growth = std::numeric_limits<double>::infinity();  // most that eta grows by in a step
  double coefficient = 1;                                   // multiplies the estimate
  bool operator==(const EscapeOptions&) const = default;
};

/// Reads "ETA0[:growth=G,coefficient=C]"; UsageError naming what would be legal.
EscapeOptions parse_escape(const std::string& option, const std::string& text);

class EscapeVelocity {
 public:
  explicit EscapeVelocity(const EscapeOptions& options)
      : options_(options), values_{options.first, options.first} {}

  double first() const { return options_.first; }
  double eta() const { return values_[0]; }
  /// eta' after a step's sums; without effect where they are not finite or the gradient is zero.
  double after(const Measured& sums) const { return next(sums)[0]; }
  void update(const Measured& sums) { values_ = next(sums); }
  /// (2) f64 in host memory: eta, and the largest estimate so far.
  Tensor state() { return {values_.data(), {2}}; }

 private:
  std::array<double, 2> next(const Measured& sums) const {
    auto [eta, most] = values_;
    const double estimate = options_.coefficient * sums.along / sums.dual;
    if (!(sums.dual > 0) || !(estimate < std::numeric_limits<double>::infinity())) return values_;
    if (eta == options_.first && estimate > eta) eta = estimate;  // the first increase is not limited
    if (estimate > most) most = estimate;
    return {most < eta * options_.growth ? most : eta * options_.growth, most};
  }

  EscapeOptions options_;
  std::array<double, 2> values_;  // eta, and what it grows towards
};
