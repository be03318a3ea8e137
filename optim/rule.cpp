#include "optim/rule.h"

#include <array>

#include "optim/escape_sums.h"
#include "optim/hyperball.h"
#include "optim/power.h"
#include "optim/update.h"

// One line per rule_NAME.cpp; the table below is the only other place that knows a rule by name.
std::unique_ptr<Rule> make_sgd(Keyed& keys);
std::unique_ptr<Rule> make_sign(Keyed& keys);
std::unique_ptr<Rule> make_signum(Keyed& keys);
std::unique_ptr<Rule> make_adam(Keyed& keys);
std::unique_ptr<Rule> make_muon(Keyed& keys);
std::unique_ptr<Rule> make_spectral(Keyed& keys);
std::unique_ptr<Rule> make_rownorm(Keyed& keys);
std::unique_ptr<Rule> make_colnorm(Keyed& keys);
std::unique_ptr<Rule> make_steepest(Keyed& keys);
std::unique_ptr<Rule> make_lion(Keyed& keys);
std::unique_ptr<Rule> make_normuon(Keyed& keys);
std::unique_ptr<Rule> make_scion(Keyed& keys);
std::unique_ptr<Rule> make_dion(Keyed& keys);
std::unique_ptr<Rule> make_prodigy(Keyed& keys);
std::unique_ptr<Rule> make_shampoo(Keyed& keys);
std::unique_ptr<Rule> make_oneside(Keyed& keys);
std::unique_ptr<Rule> make_soap(Keyed& keys);

namespace {
constexpr RuleEntry kRules[] = {
    {"muon", "polar factor of Nesterov momentum; for hidden matrices (l2->l2, RMS->RMS)", make_muon},
    {"adam", "first over root of second moment; for anything (l1->linf, smoothed)", make_adam},
    {"sgd", "gradient, with or without momentum; normalize=1 for unit length (Frobenius)", make_sgd},
    {"sign", "sign of the gradient (l1->linf)", make_sign},
    {"signum", "sign of the averaged gradient (l1->linf)", make_signum},
    {"lion", "sign of another mixture of gradient and average than is remembered (l1->linf)", make_lion},
    {"normuon", "muon, its rows brought to one size over time (l2->l2, RMS->RMS)", make_normuon},
    {"scion", "radius times the dual vector under norm=ANY; constrained=1 stays in that ball", make_scion},
    {"dion", "low-rank polar factor with error feedback; for hidden matrices (RMS->RMS)", make_dion},
    {"spectral", "polar factor of the gradient, no momentum (l2->l2)", make_spectral},
    {"colnorm", "unit columns, in the paper's orientation; for embeddings (l1->RMS, l1->l2)", make_colnorm},
    {"rownorm", "unit rows, in the paper's orientation; for heads (RMS->linf, l2->linf)", make_rownorm},
    {"shampoo", "gradient between roots of L and R; Adam's size by default (l2-l2, smoothed)", make_shampoo},
    {"oneside", "shampoo with the smaller side alone, pseudo-inverse root", make_oneside},
    {"soap", "adam in the eigenbasis of shampoo's L and R (l2-l2, smoothed)", make_soap},
    {"steepest", "dual vector under norm=ANY, with or without momentum", make_steepest},
    {"prodigy", "Adam with a step size that finds itself, the escape velocity; for anything", make_prodigy},
};
}  // namespace

std::span<const RuleEntry> rule_table() {
  return kRules;
}

std::unique_ptr<Rule> make_rule(const std::string& option, const std::string& text) {
  Keyed keys(option, text);
  std::vector<std::string> names;
  for (const RuleEntry& entry : kRules) {
    names.push_back(entry.name);
    if (keys.name() != entry.name) continue;
    std::unique_ptr<Rule> rule = entry.make(keys);
    keys.finish();
    return rule;
  }
  keys.unknown_name(names);
}

Rule::Rule(Keyed& keys, double default_lr, double default_decay)
    : lr_(keys.number("lr", default_lr, 0, 1e6)),
      weight_decay_(keys.number("wd", default_decay, 0, 1e6)),
      sensitivity_(keys.number("s", 1, 1e-9, 1e9)),
      cautious_(keys.boolean("cautious", false)),
      hyperball_(keys.boolean("hyperball", false)) {}

int64_t Rule::scratch_bytes(const Context&, const Group&) const {
  return 0;
}

bool Rule::treats_rows_apart(const Group&, bool) const {
  return false;
}

double Rule::work(const Group& group) const {
  return 20.0 * static_cast<double>(group.shape.size());  // some arithmetic per entry
}

Measured Rule::prepare(Context&, Group&, const RuleStep&) const {
  return {};
}

Tensor guard_of(Context& ctx, Scratch::Frame& frame, const RuleStep& step) {
  if (!step.grad_scale || !step.clips) return step.grad_scale;  // it is 1 or NaN already
  const Tensor guard = frame.tensor({1});
  power(ctx, {.y = guard, .x = step.grad_scale, .exponent = 0});
  return guard;
}

void stay_on_ball(Context& ctx, std::span<const Block> blocks, const RuleStep& step, double lr) {
  std::vector<Hyperball> list;
  for (const Block& block : blocks)
    list.push_back({.u = block.grad,
                    .w = block.weight,
                    .radius = block.state.back(),
                    .lr = lr,
                    .first = step.t == 1,
                    .into = weight_of(block, step)});
  hyperball(ctx, list);
}

int64_t ball_scratch_bytes(const Context& ctx, const Group& group) {
  const std::vector<int64_t> sizes(group.blocks.size(), group.shape.size());
  return hyperball_scratch_bytes(ctx, sizes);
}

std::vector<Tensor> grads_of(std::span<const Block> blocks) {
  std::vector<Tensor> list;
  for (const Block& block : blocks) list.push_back(block.grad);
  return list;
}

double measure_along(Context& ctx, std::span<const Block> blocks) {
  double along = 0;
  for (const Block& block : blocks)
    if (block.anchor)
      along += escape_sums(ctx, {.g = block.grad, .w = block.weight, .start = block.anchor}).along;
  return along;
}

Measured measure(Context& ctx, const Norm& norm, const Group& group) {
  Measured sum{.along = measure_along(ctx, group.blocks)};
  for (const Block& block : group.blocks) sum.dual += dual_norm(ctx, norm, block.grad, group.transposed);
  return sum;
}

Smoothing read_smoothing(Keyed& keys, const Smoothing& fallback) {
  return {.beta = keys.number("momentum", fallback.beta, 0, 1),
          .nesterov = keys.boolean("nesterov", fallback.nesterov),
          .ema = keys.boolean("ema", fallback.ema)};
}

std::vector<StateSpec> Smoothing::state(const Shape& block) const {
  if (beta == 0) return {};
  return {{.name = "m", .shape = block}};
}

Smooth Smoothing::operation(const Block& block, const RuleStep& step) const {
  return {.u = block.grad,
          .m = beta == 0 ? Tensor{} : block.state[0],
          .g = block.grad,
          .beta = beta,
          .gain = ema ? 1 - beta : 1,
          .scale = step.grad_scale,
          .nesterov = nesterov,
          .look = look && beta != 0 ? std::optional(Look{.m = *look, .g = 1 - *look}) : std::nullopt,
          .drop_denormals = true};
}

ApplyTo weight_of(const Block& block, const RuleStep& step) {
  if (step.apply == nullptr) return {};
  return {.w = block.weight,
          .copy = block.compute,
          .step = step.apply->step,
          .decay = step.apply->decay,
          .cautious = step.apply->cautious,
          .guard = step.grad_scale};
}

void Smoothing::apply(Context& ctx, std::span<const Block> blocks, const RuleStep& step) const {
  if (beta == 0 && !step.clips) return;
  std::vector<Smooth> list;
  for (const Block& block : blocks) list.push_back(operation(block, step));
  smooth(ctx, list);
}

std::vector<Tensor> Smoothing::smoothed(Context& ctx, std::span<const Block> blocks,
                                        const RuleStep& step) const {
  std::vector<Tensor> values;
  std::vector<Smooth> list;
  for (const Block& block : blocks) {
    list.push_back(operation(block, step));
    Smooth& entry = list.back();
    values.push_back(entry.m && !looks_ahead(entry) ? entry.m : block.grad);
    if (values.back().data == entry.m.data) entry.u = {};
  }
  if (beta != 0) smooth(ctx, list);
  return values;
}

void Smoothing::apply_to(Context& ctx, const Tensor& to, std::span<const Block> blocks,
                         const RuleStep& step) const {
  std::vector<Smooth> list;
  for (const Block& block : blocks) {
    list.push_back(operation(block, step));
    list.back().u = to[static_cast<int64_t>(list.size()) - 1];
  }
  smooth(ctx, list);
}
