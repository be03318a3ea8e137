#include "optim/rule_dual.h"

#include <fmt/format.h>

#include <algorithm>

#include "error.h"
#include "model/kernels/reduce.h"
#include "optim/update.h"

PolarMethod read_polar(Keyed& keys, const char* fallback) {
  const std::string text = keys.text("ns", fallback);
  const int steps = static_cast<int>(keys.integer("steps", 0, 0, 100));  // 0: the method's own
  PolarMethod method = polar_method(text, steps, keys.option() + " " + keys.name() + ":ns");
  method.eps = keys.number("ns_eps", 0, 0, 1);
  return method;
}

Norm read_norm(Keyed& keys, const char* fallback, bool (*family)(const Norm&), const char* legal) {
  const std::string name = keys.text("norm", fallback);
  const std::optional<Norm> norm = find_norm(name);
  if (!norm && (name == "l1-lp" || name == "lp-linf"))
    throw UsageError(fmt::format("norm={} stands for many, {} {}, put a number from 1 to inf for p: {}", name,
                                 keys.option(), keys.name(), name == "l1-lp" ? "l1-l1.5" : "l1.5-linf"));
  if (!norm || (family != nullptr && !family(*norm)))
    throw UsageError(
        fmt::format("norm={} is unknown, {} {}, choose one of: {}", name, keys.option(), keys.name(),
                    legal != nullptr ? legal : listed(norm_names()) + ", with p in [1, inf], as in l1-l1.5"));
  return *norm;
}

bool DualRule::matrices_only() const {
  switch (parts_.norm.kind) {
    case NormKind::frobenius:
    case NormKind::rms:
    case NormKind::l1_linf:
      return false;
    default:
      return true;
  }
}

double DualRule::work(const Group& group) const {
  const Norm norm = norm_of(group);
  if (!has_singular_values(norm)) return Rule::work(group);
  return (is_spectral(norm) ? parts_.polar : polar_method("svd")).flops(group.out(), group.in());
}

Measured DualRule::direction(Context& ctx, Group& group, const RuleStep& step) const {
  const Norm norm = norm_of(group);
  if (is_spectral(norm)) return spectral(ctx, group, step);
  if (norm.kind == NormKind::l1_linf) return signs(ctx, group, step);
  return smooth_and_dualize(ctx, group, step,
                            {.norm = norm, .smoothing = parts_.smoothing, .radius = parts_.radius});
}

Measured smooth_and_dualize(Context& ctx, Group& group, const RuleStep& step, const DualRule::Parts& parts) {
  Measured measured;
  std::vector<Tensor> smoothed;
  if (step.measure) {  // the gradients are needed once more
    parts.smoothing.apply(ctx, group.blocks, step);
    measured = measure(ctx, parts.norm, group);
    measured.dual *= parts.radius;
    for (const Block& block : group.blocks) smoothed.push_back(block.grad);
  } else {
    smoothed = parts.smoothing.smoothed(ctx, group.blocks, step);
  }
  for (size_t i = 0; i < smoothed.size(); ++i)
    dualize(ctx, {.out = step.apply != nullptr ? Tensor{} : group.blocks[i].grad,
                  .g = smoothed[i],
                  .norm = parts.norm,
                  .radius = parts.radius,
                  .transposed = group.transposed,
                  .into = weight_of(group.blocks[i], step),
                  .lengths = step.measure ? Tensor{} : group.blocks[i].lengths});
  return measured;
}

/// One pass over memory: smoothing, sign, and if asked the weight.
Measured DualRule::signs(Context& ctx, Group& group, const RuleStep& step) const {
  Measured measured;
  if (step.measure) {
    parts_.smoothing.apply(ctx, group.blocks, step);
    measured = measure(ctx, parts_.norm, group);
    measured.dual *= parts_.radius;
  }
  std::vector<Smooth> list;
  for (const Block& block : group.blocks) {
    list.push_back(step.measure ? Smoothing().operation(block, {}) : parts_.smoothing.operation(block, step));
    list.back().sign = true;
    if (step.apply == nullptr) continue;
    list.back().u = {};
    list.back().into = weight_of(block, step);
    list.back().into.step *= parts_.radius;
  }
  smooth(ctx, list);
  if (step.apply != nullptr || parts_.radius == 1) return measured;
  for (Smooth& entry : list) entry = {.u = entry.u, .g = entry.u, .gain = parts_.radius};
  smooth(ctx, list);
  return measured;
}

/// Matrices of one shape are copied together and iterated as batches.
Measured DualRule::spectral(Context& ctx, Group& group, const RuleStep& step) const {
  Scratch::Frame frame(ctx.scratch);
  const Tensor batch = frame.tensor(batch_shape(ctx, group), batch_dtype(ctx, group));
  return some_at_a_time(group.blocks, batch.shape[0], [&](std::span<const Block> blocks) {
    const Tensor some = batch.slice(0, std::ssize(blocks));
    return spectral_batch(ctx, {.group = group, .blocks = blocks, .batch = some}, step);
  });
}

Measured DualRule::spectral_batch(Context& ctx, const Factors& factors, const RuleStep& step) const {
  const auto& [group, blocks, batch] = factors;
  const double scale = parts_.radius * norm_scale(parts_.norm, group.out(), group.in());
  Measured measured;
  if (step.measure) {  // then the smoothed gradients are needed once more
    parts_.smoothing.apply(ctx, blocks, step);
    measured.along = measure_along(ctx, blocks);
    Smoothing().apply_to(ctx, batch, blocks, {});
  } else {
    parts_.smoothing.apply_to(ctx, batch, blocks, step);
  }
  polar(ctx, {.x = batch, .method = parts_.polar});
  refine(ctx, factors, step);
  std::vector<Smooth> list;
  for (size_t i = 0; i < blocks.size(); ++i) {
    const Tensor factor = batch[static_cast<int64_t>(i)];
    // <m, u> is the dual norm for exact polar factors, and what the step really achieves for others.
    if (step.measure) measured.dual += scale * dot(ctx, blocks[i].grad, factor);
    list.push_back({.u = blocks[i].grad, .g = factor, .gain = scale});
  }
  smooth(ctx, list);
  return measured;
}

void DualRule::refine(Context&, const Factors&, const RuleStep&) const {}

Norm DualRule::norm_of(const Group& group) const {
  return !group.is_matrix() && parts_.norm.kind == NormKind::rms_rms ? Norm{NormKind::rms} : parts_.norm;
}

int64_t DualRule::scratch_bytes(const Context& ctx, const Group& group) const {
  const Norm norm = norm_of(group);
  if (!is_spectral(norm)) return norm_scratch_bytes(ctx, norm, group.shape, group.dtype);
  const Shape batch = batch_shape(ctx, group);
  const DType dtype = batch_dtype(ctx, group);
  return dtype_bytes(dtype) * batch.size() +
         std::max(polar_scratch_bytes(ctx, batch, dtype, parts_.polar), whole_scratch_bytes());
}

DType DualRule::batch_dtype(const Context& ctx, const Group& group) const {
  if (group.dtype == DType::f64 || !parts_.polar.bears_bf16()) return group.dtype;
  return ctx.dtype;
}

/// As many matrices as should be gathered together, at least one: what the caches of a CPU hold, all of most
/// models' on a GPU.
Shape DualRule::batch_shape(const Context& ctx, const Group& group) const {
  const int64_t most = ctx.where == Where::cpu ? int64_t{32} << 20 : int64_t{1} << 30;
  const int64_t fit =
      std::max<int64_t>(most / (dtype_bytes(batch_dtype(ctx, group)) * group.shape.size()), 1);
  return {std::min(fit, static_cast<int64_t>(group.blocks.size())), group.shape[0], group.shape[1]};
}
