#include "optim/optimizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "error.h"
#include "optim/modular.h"
#include "optim/optimizer_parts.h"
#include "optim/update.h"

void Optimizer::step(int64_t t, int64_t total, bool keep_directions) {
  if (t == 0) keep_anchors();
  measure_gradients();
  const bool first = measures_first();
  if (first) {
    agreement_.guess();  // from this rank's pieces alone: 1 or NaN
    copy_state(Copy::aside);
  } else {
    settle(agreement_.agree(unsettled_));
  }
  rates_ = {.multiplier = options_.schedule.multiplier(t, total), .eta = escape_ ? escape_->eta() : 0};
  RuleStep step{.t = t + 1,
                .grad_scale = agreement_.factor(),
                .clips = options_.grad_clip > 0 && !first,
                .measure = options_.measured()};
  if (escape_) step.eta = step.next_eta = rates_.eta, step.first_eta = escape_->first();
  Measured found = prepare(step);
  if (needs_next_eta()) {
    settle(agreement_.total(found));
    step.next_eta = escape_->eta();
    found = {};
  }
  found += directions(step, keep_directions);
  if (escape_) unsettled_ = found;
  if (options_.sharpness > 0) {
    found = first ? agree_late(found) : agreement_.total(found);
    rates_.sharp = rates_.multiplier * steepest_step(found.dual, options_.sharpness);
    for (const Batch& batch : batches_) apply(batch);
  }
  const auto& rows = assignment_.rows;
  const auto hidden =
      std::ranges::find_if(rows, [](const AssignedRule& r) { return r.parameter->role == Role::hidden; });
  const AssignedRule& shown = hidden != rows.end() ? *hidden : rows.front();
  enqueued_[next_ticket_ % 2] = {.t = t, .lr = lr_of(*shown.rule), .eta = rates_.eta};
}

void Optimizer::keep_anchors() {
  std::vector<Smooth> list;
  for (const Shard& shard : shards_)
    if (shard.anchor)
      list.push_back(
          {.u = shard.anchor, .g = row_of(shard).parameter->master(shard.piece.first, shard.piece.rows)});
  if (!list.empty()) smooth(ctx_, list);
}

/// The squares of a gradient's lengths add up to its own, so that those stand for it.
void Optimizer::measure_gradients() {
  for (const Batch& batch : batches_)
    for (const Block& block : batch.group.blocks)
      if (block.lengths) measure_lengths(ctx_, batch.rule->lengths(batch.group), block.lengths, block.grad);
  agreement_.square(squared_);
}

void Optimizer::copy_state(Copy to) {
  std::vector<Smooth> list;
  for (const Shard& shard : shards_)
    for (size_t k = 0; k < shard.aside.size(); ++k) {
      list.push_back({.u = shard.aside[k], .g = shard.state[k]});
      if (to == Copy::back) std::swap(list.back().u, list.back().g);
    }
  if (!list.empty()) smooth(ctx_, list);
}

bool Optimizer::needs_next_eta() const {
  return std::ranges::any_of(batches_, [](const Batch& b) { return b.rule->needs_next_eta(); });
}

/// The exchange after the directions: takes their state back where a gradient was not finite, and brings the
/// numbers to what they are of clipped gradients.
Measured Optimizer::agree_late(const Measured& own) {
  const Measured all = agreement_.agree(own);
  const double clip = agreement_.factor_here();
  if (std::isnan(clip)) copy_state(Copy::back);
  return {.dual = clip * all.dual, .along = clip * all.along};
}

void Optimizer::settle(const Measured& all) {
  if (escape_) escape_->update(all);
  unsettled_ = {};
}

/// What a rule's direction is multiplied by before the sensitivity. With a sharpness it is the rule's own, of
/// no account, until the dual norms are known.
double Optimizer::lr_of(const Rule& rule) const {
  if (rates_.sharp) return *rates_.sharp;
  if (options_.escape) return rates_.multiplier * rates_.eta;
  return rates_.multiplier * rule.lr() * (rule.escapes() ? rates_.eta : 1);
}

Measured Optimizer::prepare(const RuleStep& step) {
  Measured sums;
  for (Batch& batch : batches_) {
    if (!batch.rule->escapes() || batch.group.blocks.empty()) continue;
    RuleStep own = step;
    own.lr = lr_of(*batch.rule);
    const Measured measured = batch.rule->prepare(ctx_, batch.group, own);
    sums += {.dual = measured.dual / batch.sensitivity, .along = measured.along};
  }
  return sums;
}

/// Under a sharpness the weights stay: step sizes come from the directions of all.
Measured Optimizer::directions(const RuleStep& step, bool keep_directions) {
  Measured sums;
  for (Batch& batch : batches_) {
    batch.applied =
        (batch.rule->fuses() || batch.rule->hyperball()) && !keep_directions && !options_.measured();
    if (!batch.group.blocks.empty()) {
      const Measured measured = direction(batch, step);
      sums += {.dual = measured.dual / batch.sensitivity, .along = measured.along};
    }
    if (options_.sharpness == 0) apply(batch);
  }
  return sums;
}

Measured Optimizer::direction(Batch& batch, RuleStep step) {
  const Rule& rule = *batch.rule;
  step.lr = lr_of(rule);
  const Applying applying{.step = step.lr / batch.sensitivity,
                          .decay = step.lr * rule.weight_decay(),
                          .cautious = rule.cautious()};
  const Applying* const apply = batch.applied ? &applying : nullptr;
  step.apply = rule.hyperball() ? nullptr : apply;
  const Measured measured = rule.direction(ctx_, batch.group, step);
  step.apply = apply;
  if (rule.hyperball()) stay_on_ball(ctx_, batch.group.blocks, step, applying.step);
  return measured;
}

/// Moves the weights, if the direction has not done so, and tells.
void Optimizer::apply(const Batch& batch) {
  const double lr = lr_of(*batch.rule);
  std::vector<ApplyUpdate> list;
  for (const Block& block : batch.group.blocks)
    list.push_back({.w = block.weight,
                    .u = block.grad,
                    .copy = block.compute,
                    .step = lr / batch.sensitivity,
                    .decay = lr * batch.rule->weight_decay(),
                    .cautious = batch.rule->cautious(),
                    .guard = agreement_.factor()});
  if (!batch.applied && !list.empty()) apply_update(ctx_, list);
  if (moved_) moved_(batch.parameters);
}

std::vector<RowStep> Optimizer::last_steps() const {
  std::vector<RowStep> steps;
  for (const AssignedRule& row : assignment_.rows)
    steps.push_back({.parameter = row.parameter,
                     .norm = row.rule->norm(),
                     .step = lr_of(*row.rule) / row.sensitivity,
                     .sensitivity = row.sensitivity});
  return steps;
}

bool Optimizer::capturable() const {
  bool waits = options_.measured() || escape_ || ctx_.profile != nullptr || !ctx_.comm->capturable();
  for (const AssignedRule& row : assignment_.rows) waits = waits || row.rule->waits();
  return !waits;
}

int64_t Optimizer::mark() {
  const int64_t ticket = agreement_.mark();
  next_ticket_ = ticket + 1;
  return ticket;
}

StepReport Optimizer::report(int64_t ticket) {
  const std::span<const double> totals = agreement_.norms(ticket);
  const Enqueued& enqueued = enqueued_[ticket % 2];
  for (size_t i = 0; i < shards_.size(); ++i)
    if (!std::isfinite(totals[i]))
      throw RunError(
          fmt::format("the gradient of {} is not finite, step {}, lower the learning rate or clip gradients",
                      row_of(shards_[i]).parameter->name, enqueued.t));
  const double norm = totals.back();
  const bool clipped = options_.grad_clip > 0 && norm > options_.grad_clip;
  return {.step = enqueued.t,
          .grad_norm = norm,
          .clip_scale = clipped ? options_.grad_clip / norm : 1,
          .lr = enqueued.lr,
          .eta = enqueued.eta};
}
