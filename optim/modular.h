// The modular norm and its steepest descent (Proposition 7 of arXiv 2409.20325).
//
// Tensors W_1 .. W_L, each with a norm ||.||_l and a sensitivity s_l > 0:
//
//   modular norm       max_l s_l ||W_l||_l
//   its dual           sum_l ||G_l||_l^dual / s_l
//   steepest descent   eta = (1 / lambda) sum_k ||G_k||_k^dual / s_k,      dW_l = -(eta / s_l) dualize_l(G_l)
//
// which minimises  sum_l <G_l, dW_l> + (lambda / 2) (max_l s_l ||dW_l||_l)^2.  lambda is the sharpness. Every
// tensor takes part of the same step: s_l ||dW_l||_l = eta for each whose gradient is not zero.
#pragma once

#include <span>

#include "optim/norm.h"

/// One tensor of the model and how it is measured.
struct ModularTerm {
  Tensor x;  // weight or gradient
  Norm norm;
  double s = 1;             // sensitivity
  bool transposed = false;  // storage is (in, out)
};

/// max_l s_l ||W_l||_l
double modular_norm(Context& ctx, std::span<const ModularTerm> weights);
/// sum_l ||G_l||_l^dual / s_l
double modular_dual_norm(Context& ctx, std::span<const ModularTerm> gradients);
/// eta of a sharpness lambda > 0 and a modular dual norm.
inline double steepest_step(double modular_dual, double sharpness) {
  return modular_dual / sharpness;
}
/// Replaces every gradient G_l by dW_l; returns eta.
double steepest_descent(Context& ctx, std::span<const ModularTerm> gradients, double sharpness);
