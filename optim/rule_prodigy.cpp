// prodigy: Adam's direction with a step size that finds itself, the escape velocity (escape.h). Three
// orderings of the same idea, all with one eta for all tensors, W_0 the weights before the first step and
// b3 = sqrt(beta2):
//
// clang-format off
//   variant   eta'                               r and s gain                        W moves by
//   paper     max(eta, r / ||s||_1)              r += (1 - b3) eta^2 <g, W_0 - W>    -lr eta m / (sqrt(v) + eta eps)
//                                                s += (1 - b3) eta^2 g
//   no-ema    max(eta, <g, W_0 - W> / ||g||_1)   nothing is remembered               -lr eta sign(g)
//   package   the same as paper, with            r += (eta / eta0) d <g, W_0 - W>    -d m / (sqrt(v) + eta' eps)
//             coefficient and growth             s += (eta / eta0) d g
// clang-format on
//
//   m = beta1 m + (1 - beta1) eta g,   v = beta2 v + (1 - beta2) eta^2 g^2,   r = b3 r + ..,   s = b3 s + ..
//
// paper: equations 22-27 of "Old Optimizer, New Norm" (arXiv 2409.20325), with 0 / 0 = 0 where eps = 0.
// no-ema: its equations 28-29, sign descent with the escape velocity; what `paper` is for beta1 = beta2 = 0,
// and `sign` under --escape, bit for bit where sums run in one order (on a GPU up to 2^18 elements of a
// tensor). package: the order in which Mishchenko and Defazio's prodigyopt computes (Prodigy: arXiv
// 2306.06101); d = lr eta, times sqrt(1 - beta2^t) / (1 - beta1^t) with bias_correction (which leaves weight
// decay alone here); m counts eta' in the place of eta when beta1 = 0; safeguard_warmup leaves the schedule
// out of s, so that eta does not grow faster while lr is warmed up. lr is what the schedule makes of the key
// lr, 1.
//
// Where no direction needs the next eta, r and s are summed up in the pass that moves the weights.
//
// Tensors of sensitivity s_l count as ||s||_1 / s_l and move by 1 / s_l of the step.
//
// As for adam, g^2 ends at |g| = 1.8e19 in float32, where v is infinite, and is 0 below 1e-22; either way the
// entry stays where it is unless eps decides.
//
// State is kept in units of eta0 (m / eta0, v / eta0^2, s / eta0^2, r / eta0^2), so that float32 reaches: eta
// begins at 1e-6 and stands squared in v. Only ratios of these numbers count.
#include <cmath>

#include "model/kernels/reduce.h"
#include "optim/escape_sums.h"
#include "optim/host_memory.h"
#include "optim/rule.h"
#include "optim/update.h"

namespace {
constexpr const char* kVariants[] = {"paper", "no-ema", "package"};

class Prodigy final : public Rule {
 public:
  explicit Prodigy(Keyed& keys) : Rule(keys, 1) {
    const std::string variant = keys.choice("variant", "paper", kVariants);
    package_ = variant == "package";
    velocity_.first = keys.number("eta0", velocity_.first, 1e-30, 1);
    if (variant == "no-ema") return;
    beta1_ = keys.number("beta1", 0.9, 0, 0.999999);
    beta2_ = keys.number("beta2", 0.999, 0, 0.999999);
    eps_ = keys.number("eps", package_ ? 1e-8 : 0, 0, 1);
    if (!package_) return;
    velocity_.growth = keys.number("growth", velocity_.growth, 1, std::numeric_limits<double>::infinity());
    velocity_.coefficient = keys.number("coefficient", 1, 1e-9, 1e9);
    bias_correction_ = keys.boolean("bias_correction", false);
    safeguard_warmup_ = keys.boolean("safeguard_warmup", false);
  }

  Norm norm() const override { return {NormKind::l1_linf}; }
  std::string describe() const override {
    return beta1_ + beta2_ > 0 ? "l1-linf, smoothed, lr x eta" : "l1-linf, lr x eta";
  }
  std::optional<EscapeOptions> escapes() const override { return velocity_; }
  bool needs_next_eta() const override { return package_ && (eps_ > 0 || beta1_ == 0); }
  bool fuses() const override { return true; }

  std::vector<StateSpec> state(const Group& group) const override {
    std::vector<StateSpec> specs;
    if (beta2_ > 0) specs = {{.name = "s", .shape = group.shape}, {.name = "r", .shape = {}}};
    if (beta1_ > 0) specs.push_back({.name = "m", .shape = group.shape});
    if (beta2_ > 0) specs.push_back({.name = "v", .shape = group.shape});
    return specs;
  }
  int64_t scratch_bytes(const Context&, const Group&) const override { return whole_scratch_bytes(); }

  Measured prepare(Context& ctx, Group& group, const RuleStep& step) const override {
    if (in_one_pass()) return {};
    const std::optional<Weights> weights = clipped_weights(ctx, step);
    Measured sums;
    if (weights)
      for (const Block& block : group.blocks) sums += sum_block(ctx, block, *weights, nullptr);
    return sums;
  }

  Measured direction(Context& ctx, Group& group, const RuleStep& step) const override {
    const std::vector<AdamDirection> list = directions(group, step);
    if (!in_one_pass()) {
      adam_direction(ctx, list);
      return {};
    }
    const std::optional<Weights> weights = clipped_weights(ctx, step);
    Measured sums;
    if (weights)
      for (size_t i = 0; i < list.size(); ++i) sums += sum_block(ctx, group.blocks[i], *weights, &list[i]);
    return sums;
  }

 private:
  /// Whether the sums of the next eta may be taken in the pass that makes the directions.
  bool in_one_pass() const { return !needs_next_eta(); }

  std::vector<AdamDirection> directions(const Group& group, const RuleStep& step) const {
    const bool moments = beta1_ > 0 || beta2_ > 0;
    const double unit = moments ? step.first_eta : step.eta;  // without them the length of g does not matter
    std::vector<AdamDirection> list;
    for (const Block& block : group.blocks)
      list.push_back({.u = step.apply != nullptr ? Tensor{} : block.grad,
                      .m = beta1_ > 0 ? block.state[beta2_ > 0 ? 2 : 0] : Tensor{},
                      .v = beta2_ > 0 ? block.state[beta1_ > 0 ? 3 : 2] : Tensor{},
                      .g = block.grad,
                      .beta1 = beta1_,
                      .beta2 = beta2_,
                      .eps = eps_ * (package_ ? step.next_eta : step.eta) / unit,
                      .correction1 = 1 / gain(step),
                      .gain = step.eta / unit,
                      .scale = step.grad_scale,
                      .into = weight_of(block, step)});
    return list;
  }

  /// r is a number of the whole.
  bool treats_rows_apart(const Group&, bool) const override { return beta2_ == 0; }

  /// How much the newest gradient counts in r and in s, in units of eta0.
  struct Weights {
    double r, s;
  };

  Weights weights_of(const RuleStep& step) const {
    const double grown = step.eta / step.first_eta;
    if (package_) {
      const double d = step.lr * correction(step) / step.first_eta;
      return {.r = grown * d, .s = grown * (safeguard_warmup_ ? grown : d)};
    }
    if (beta2_ == 0) return {1, 1};  // it would cancel
    const double both = (1 - std::sqrt(beta2_)) * grown * grown;
    return {both, both};
  }

  /// Of clipped gradients; nothing when one is not finite.
  std::optional<Weights> clipped_weights(Context& ctx, const RuleStep& step) const {
    const double clip = step.grad_scale ? *OnHost(ctx, step.grad_scale)->f32() : 1;
    if (std::isnan(clip)) return std::nullopt;
    const Weights weights = weights_of(step);
    return Weights{.r = weights.r * clip, .s = weights.s * clip};
  }

  /// Updates r and s; `then` as in EscapeSums.
  Measured sum_block(Context& ctx, const Block& block, const Weights& weights,
                     const AdamDirection* then) const {
    if (beta2_ == 0) {
      const Measured now = escape_sums(
          ctx, {.g = block.grad, .w = block.weight, .start = block.anchor, .sizes = true, .then = then});
      return {.dual = weights.s * now.dual, .along = weights.r * now.along};
    }
    const double b3 = std::sqrt(beta2_);
    const Measured sums = escape_sums(ctx, {.g = block.grad,
                                            .w = block.weight,
                                            .start = block.anchor,
                                            .s = block.state[0],
                                            .beta = b3,
                                            .gain = weights.s,
                                            .then = then});
    OnHost kept(ctx, block.state[1]);
    double r = 0;
    load_doubles(&r, *kept);
    r = b3 * r + weights.r * sums.along;
    store_doubles(*kept, [&](int64_t) { return r; });
    kept.store();
    return {.dual = sums.dual, .along = r};
  }

  double correction(const RuleStep& step) const {
    const double t = static_cast<double>(step.t);
    return bias_correction_ ? std::sqrt(1 - std::pow(beta2_, t)) / (1 - std::pow(beta1_, t)) : 1;
  }
  /// What the package's direction is multiplied by.
  double gain(const RuleStep& step) const {
    if (!package_) return 1;
    return correction(step) * (beta1_ == 0 ? step.next_eta / step.eta : 1);
  }

  EscapeOptions velocity_;
  double beta1_ = 0, beta2_ = 0, eps_ = 0;
  bool package_ = false, bias_correction_ = false, safeguard_warmup_ = false;
};
}  // namespace

std::unique_ptr<Rule> make_prodigy(Keyed& keys) {
  return std::make_unique<Prodigy>(keys);
}
