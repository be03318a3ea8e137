// lion: the dual vector of the l1->linf norm, of a mixture that leans more on the new gradient than what is
// remembered does.
//
//   u = sign(beta1 m + (1 - beta1) g);   then   m = beta2 m + (1 - beta2) g
//
// Chen et al., arXiv 2302.06675, Algorithm 2; wd is its decoupled decay. With beta1 = beta2 it is signum, bit
// for bit. Elements of u are as large as Adam's at its largest, so lr is 3 to 10 times smaller than Adam's.
#include "optim/rule_dual.h"

namespace {
class Lion final : public DualRule {
 public:
  explicit Lion(Keyed& keys) : DualRule(keys, 1e-4) {
    Smoothing smoothing;
    smoothing.look = keys.number("beta1", 0.9, 0, 1);
    smoothing.beta = keys.number("beta2", 0.99, 0, 1);
    set({.norm = {NormKind::l1_linf}, .smoothing = smoothing});
  }
  std::string describe() const override { return "l1-linf, looking ahead"; }
};
}  // namespace

std::unique_ptr<Rule> make_lion(Keyed& keys) {
  return std::make_unique<Lion>(keys);
}
