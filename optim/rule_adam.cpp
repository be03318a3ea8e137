// adam: sign descent smoothed by first and second moments; with both betas and eps 0 it is `sign`, bit for
// bit.
//
//   m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2
//   u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)          0 / 0 = 0; without the corrections on
//   request
//
// Kingma & Ba, arXiv 1412.6980; with wd it is AdamW. u is not a unit vector of any norm, only close to one of
// l1->linf. Asked for a dual norm it reports ||m / (1 - beta1^t)||_1, the l1 norm of what it takes the
// smoothed sign of, which is exact when both betas are 0. In float32 g^2 ends at |g| = 1.8e19: v is infinite
// from then on and the entry stays where it is. Below 1e-19 it is 0, so that eps decides.
#include <cmath>

#include "model/kernels/reduce.h"
#include "optim/rule.h"
#include "optim/update.h"

namespace {
class Adam final : public Rule {
 public:
  explicit Adam(Keyed& keys)
      : Rule(keys, 1e-3),
        beta1_(keys.number("beta1", 0.9, 0, 0.999999)),
        beta2_(keys.number("beta2", 0.95, 0, 0.999999)),
        eps_(keys.number("eps", 1e-8, 0, 1)),
        bias_correction_(keys.boolean("bias_correction", true)) {}

  Norm norm() const override { return {NormKind::l1_linf}; }
  std::string describe() const override { return "l1-linf, smoothed"; }

  bool fuses() const override { return true; }
  bool scale_free(const Group& group) const override { return state(group).empty() && eps_ == 0; }

  std::vector<StateSpec> state(const Group& group) const override {
    std::vector<StateSpec> specs;
    if (beta1_ > 0) specs.push_back({.name = "m", .shape = group.shape});
    if (beta2_ > 0) specs.push_back({.name = "v", .shape = group.shape});
    return specs;
  }

  int64_t scratch_bytes(const Context&, const Group&) const override { return whole_scratch_bytes(); }

  Measured direction(Context& ctx, Group& group, const RuleStep& step) const override {
    const double t = static_cast<double>(step.t);
    const double correction1 = bias_correction_ ? 1 - std::pow(beta1_, t) : 1;
    const double correction2 = bias_correction_ ? 1 - std::pow(beta2_, t) : 1;
    std::vector<AdamDirection> list;
    Measured measured;
    for (const Block& block : group.blocks) {
      list.push_back({.u = step.apply != nullptr ? Tensor{} : block.grad,
                      .m = beta1_ > 0 ? block.state.front() : Tensor{},
                      .v = beta2_ > 0 ? block.state[beta1_ > 0 ? 1 : 0] : Tensor{},
                      .g = block.grad,
                      .beta1 = beta1_,
                      .beta2 = beta2_,
                      .eps = eps_,
                      .correction1 = correction1,
                      .correction2 = correction2,
                      .scale = step.grad_scale,
                      .into = weight_of(block, step)});
    }
    if (step.measure && beta1_ == 0) {  // g is what it takes the smoothed sign of
      const double scale = step.clips ? *OnHost(ctx, step.grad_scale)->f32() : 1;
      measured = measure(ctx, norm(), group);
      measured.dual *= scale, measured.along *= scale;
    }
    adam_direction(ctx, list);
    if (step.measure && beta1_ > 0) {  // and now m is
      Group moments = group;
      for (Block& block : moments.blocks) block.grad = block.state.front();
      measured = measure(ctx, norm(), moments);
      measured.dual /= correction1, measured.along /= correction1;
    }
    return measured;
  }

 private:
  bool treats_rows_apart(const Group&, bool) const override { return true; }

  double beta1_, beta2_, eps_;
  bool bias_correction_;
};
}  // namespace

std::unique_ptr<Rule> make_adam(Keyed& keys) {
  return std::make_unique<Adam>(keys);
}
