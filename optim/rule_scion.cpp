// scion: a step to the boundary of a ball of some norm, and with constrained=1 a stay inside of that ball.
//
//   d = (1 - alpha) d + alpha g                              alpha = 1: no memory
//   W <- W - lr radius dualize(d)                            constrained=0, wd as everywhere
//   W <- (1 - lr) W - lr radius dualize(d)                   constrained=1: stochastic Frank-Wolfe
//
// Pethick et al., "Training Deep Learning Models with Norm-Constrained LMOs", arXiv 2502.07529, Algorithms 1
// (constrained) and 2. Constrained, W is an average of points of the ball ||W|| <= radius: once inside, it
// never leaves (for lr <= 1), and Muon with lr' = lr radius, wd' = 1 / radius is the same rule.
//
// norm is any norm of norm.h. What the paper takes for which layer:
//   rms-rms           matrices, and vectors, where it is the RMS norm (the default)
//   spectral-keller   input layers: the factor sqrt(out / in), but at least 1
//   scaled-l1-linf    heads: sign(d) / in;   l1-rms  embeddings;   rms-linf  rows
// ns and steps as for muon. The paper also starts every layer on the boundary of its ball and scales
// activations by sqrt 2; neither is done here, the model starts as it does under every rule.
#include <fmt/format.h>

#include "error.h"
#include "optim/rule_dual.h"

namespace {
class Scion final : public DualRule {
 public:
  Scion(Keyed& keys, bool constrained)
      : DualRule(keys, 0.02, constrained ? 1 : 0), constrained_(constrained) {
    if (constrained && (weight_decay() != 1 || cautious() || hyperball()))
      throw UsageError(
          fmt::format("constrained=1 is a decay of 1 by itself, {} {}, leave wd, cautious and "
                      "hyperball out or choose constrained=0",
                      keys.option(), keys.name()));
    Parts parts;
    parts.norm = read_norm(keys, "rms-rms");
    parts.smoothing.beta = 1 - keys.number("alpha", 0.1, 1e-6, 1);
    parts.radius = keys.number("radius", 1, 1e-9, 1e9);
    if (is_spectral(parts.norm)) parts.polar = read_polar(keys, "polar-express");
    set(parts);
  }
  bool matrices_only() const override {
    return parts().norm.kind != NormKind::rms_rms && DualRule::matrices_only();
  }
  std::string describe() const override {
    return fmt::format("{}, radius {:g}{}", norm_name(norm()), parts().radius,
                       constrained_ ? ", constrained" : "");
  }

 private:
  bool constrained_;
};
}  // namespace

std::unique_ptr<Rule> make_scion(Keyed& keys) {
  const bool constrained = keys.boolean("constrained", false);
  return std::make_unique<Scion>(keys, constrained);
}
