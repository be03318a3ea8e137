// sign and signum: the dual vector of the l1->linf norm, max |W_ij| (Propositions 2 and 3).
//
//   sign     u = sign(g)
//   signum   m = beta m + (1 - beta) g;   u = sign(m)          Bernstein et al., arXiv 1802.04434
#include "optim/norm.h"
#include "optim/rule.h"
#include "optim/update.h"

namespace {
class SignRule final : public Rule {
 public:
  SignRule(Keyed& keys, bool averaged) : Rule(keys, 1e-3) {
    if (averaged) smoothing_.beta = keys.number("beta", 0.9, 0, 1);
  }

  std::string norm_name() const override { return ::norm_name(NormKind::l1_linf); }
  std::vector<StateSpec> state(const Shape& block) const override { return smoothing_.state(block); }

  int64_t scratch_bytes(const Context& ctx, const Group& group) const override {
    return norm_scratch_bytes(ctx, NormKind::l1_linf, group.shape);
  }

  double direction(Context& ctx, Group& group, const RuleStep& step) const override {
    smoothing_.apply(ctx, group.blocks, step);
    double dual = 0;
    std::vector<Sign> list;
    for (const Block& block : group.blocks) {
      if (step.want_dual) dual += dual_norm(ctx, NormKind::l1_linf, block.grad);
      list.push_back({.u = block.grad, .x = block.grad});
    }
    sign(ctx, list);
    return dual;
  }

 private:
  Smoothing smoothing_;
};
}  // namespace

std::unique_ptr<Rule> make_sign(Keyed& keys) {
  return std::make_unique<SignRule>(keys, false);
}
std::unique_ptr<Rule> make_signum(Keyed& keys) {
  return std::make_unique<SignRule>(keys, true);
}
