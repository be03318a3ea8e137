#include "optim/modular.h"

#include <algorithm>
#include <cmath>

#include "optim/update.h"

double modular_norm(Context& ctx, std::span<const ModularTerm> weights) {
  double largest = 0;
  for (const ModularTerm& term : weights) {
    const double value = term.s * norm(ctx, term.norm, term.x, term.transposed);
    if (!(value <= largest)) largest = value;  // a NaN gets through, and stays
  }
  return largest;
}

double modular_dual_norm(Context& ctx, std::span<const ModularTerm> gradients) {
  double sum = 0;
  for (const ModularTerm& term : gradients)
    sum += dual_norm(ctx, term.norm, term.x, term.transposed) / term.s;
  return sum;
}

double steepest_descent(Context& ctx, std::span<const ModularTerm> gradients, double sharpness) {
  expect(sharpness > 0, "steepest_descent: the sharpness must be positive");
  const double eta = steepest_step(modular_dual_norm(ctx, gradients), sharpness);
  for (const ModularTerm& term : gradients) {
    dualize(ctx, {.out = term.x, .g = term.x, .norm = term.norm, .transposed = term.transposed});
    smooth(ctx, {.u = term.x, .g = term.x, .gain = -eta / term.s});
  }
  return eta;
}
