// sign and signum: the dual vector of the l1->linf norm, max |W_ij| (Propositions 2 and 3).
//
//   sign     u = sign(g)
//   signum   m = beta m + (1 - beta) g;   u = sign(m)          Bernstein et al., arXiv 1802.04434
#include "optim/rule_dual.h"

namespace {
class SignRule final : public DualRule {
 public:
  SignRule(Keyed& keys, bool averaged) : DualRule(keys, 1e-3) {
    Smoothing smoothing;
    if (averaged) smoothing.beta = keys.number("beta", 0.9, 0, 1);
    set({.norm = {NormKind::l1_linf}, .smoothing = smoothing});
  }
};
}  // namespace

std::unique_ptr<Rule> make_sign(Keyed& keys) {
  return std::make_unique<SignRule>(keys, false);
}
std::unique_ptr<Rule> make_signum(Keyed& keys) {
  return std::make_unique<SignRule>(keys, true);
}
