#include "optim/graft.h"

#include <cmath>

#include "optim/update.h"

namespace {
constexpr const char* kGrafts[] = {"adam", "adagrad", "sgd", "none"};
}  // namespace

Graft::Graft(Keyed& keys, double default_beta2) : kind_(keys.choice("graft", "adam", kGrafts)) {
  if (kind_ == "adam") beta2_ = keys.number("graft_beta2", default_beta2, 0, 0.999999);
  if (by_moments()) eps_ = keys.number("graft_eps", 1e-8, 0, 1);
}

void Graft::directions(Context& ctx, const Tensor& to, std::span<const Block> blocks,
                       std::span<const Tensor> v, const RuleStep& step) const {
  // A sum of squares is t times their mean, whose newest part is 1 / t.
  const double t = static_cast<double>(step.t);
  const double beta2 = kind_ == "adagrad" ? 1 - 1 / t : beta2_,
               correction2 = kind_ == "adagrad" ? 1 / t : 1 - std::pow(beta2, t);
  std::vector<AdamDirection> adam;
  std::vector<Smooth> sgd;
  for (size_t i = 0; i < blocks.size(); ++i) {
    const Tensor u = to[static_cast<int64_t>(i)], g = blocks[i].grad;
    if (by_moments())
      adam.push_back({.u = u,
                      .v = keeps_v() ? v[i] : Tensor{},
                      .g = g,
                      .beta1 = 0,
                      .beta2 = beta2,
                      .eps = eps_,
                      .correction2 = correction2,
                      .scale = step.grad_scale});
    else
      sgd.push_back({.u = u, .g = g, .scale = step.grad_scale});
  }
  if (by_moments())
    adam_direction(ctx, adam);
  else
    smooth(ctx, sgd);
}
