#include "optim/optimizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "error.h"
#include "model/kernels/reduce.h"
#include "optim/hyperball.h"
#include "optim/modular.h"
#include "optim/sensitivity.h"
#include "optim/update.h"

struct Optimizer::Row {
  Parameter* parameter;
  const Rule* rule;
  std::string text, by;            // of the rule, and what gave it: a role or a pattern
  double sensitivity;              // of the rule and of options.sensitivities
  std::vector<StateSpec> specs;    // per block
  std::vector<Tensor> state = {};  // of the whole parameter: the blocks' states stacked
  Tensor anchor = {};              // the weight before the first step, for an escape velocity
  bool needs_anchor = false;
  size_t batch = 0;  // where its blocks are
};

struct Optimizer::Batch {
  const Rule* rule;
  double sensitivity;
  Group group;
  double lr = 0;         // of the last step, after the schedule
  bool applied = false;  // the last step's direction() has moved the weights
};

namespace {
std::string option_of(Role role) {
  return fmt::format("--{}", role_name(role));
}

/// The shape of one of the parameter's blocks.
Shape block_shape(const Parameter& p) {
  if (!p.is_matrix()) return p.shape;
  expect(p.shape[0] % p.matrices == 0, "optimizer: a fused parameter's rows must divide into its matrices");
  return {p.shape[0] / p.matrices, p.shape[1]};
}

/// The group that the parameter's blocks belong to, without any blocks yet.
Group group_of(const Parameter& p) {
  return {.shape = block_shape(p), .transposed = p.stored_transposed(), .blocks = {}};
}

/// `count` blocks of this shape, one below the other.
Shape stacked(const Shape& block, int count) {
  switch (block.rank()) {
    case 0:
      return {count};
    case 1:
      return {block[0] * count};
    default:
      return {block[0] * count, block[1]};
  }
}

/// The part of a stacked tensor that belongs to block i of `count`.
Tensor block_of(const Tensor& tensor, int i, int count) {
  const int64_t rows = tensor.shape[0] / count;
  return tensor.slice(i * rows, rows);
}
}  // namespace

Optimizer::Optimizer(Context& ctx, ParameterTable& table, const OptimizerOptions& options)
    : ctx_(ctx), table_(table), options_(options) {
  assign_rules();
  check_step_sizes();
  plan_state();
  grads_.resize(rows_.size());
  for (size_t i = 0; i < rows_.size(); ++i) grads_[i].shape = rows_[i].parameter->shape;
  arena_.add(&totals_, DType::f64, {static_cast<int64_t>(rows_.size()) + 1});
  arena_.add(&grad_scale_, {1});
}

const Rule* Optimizer::add_rule(const std::string& option, const std::string& text) {
  rules_.push_back(make_rule(option, text));
  return rules_.back().get();
}

/// One row for every parameter, with the rule of its role or its name.
void Optimizer::assign_rules() {
  struct Named {
    const Rule* rule;
    std::string text, by, option;
    bool used = false;
  };
  std::map<Role, Named> by_role;
  for (const auto& [role, text] : options_.rules)
    by_role[role] = {add_rule(option_of(role), text), text, role_name(role), option_of(role)};
  std::vector<Named> by_name;
  for (const RuleOverride& o : options_.overrides) {
    const std::string option = "--set '" + o.pattern + "'";
    by_name.push_back({add_rule(option, o.rule), o.rule, o.pattern, option});
  }
  const std::vector<double> sensitivities = read_sensitivities(options_.sensitivities, table_);
  for (Parameter& p : table_) {
    Named* named = by_role.contains(p.role) ? &by_role[p.role] : nullptr;
    for (Named& candidate : by_name)
      if (name_matches(candidate.by, p.name)) named = &candidate, candidate.used = true;
    if (named == nullptr)
      throw UsageError(fmt::format("no rule for {}, {}, give one such as {} adam", p.name, option_of(p.role),
                                   option_of(p.role)));
    if (named->rule->matrices_only() && !p.is_matrix())
      throw UsageError(
          fmt::format("'{}' needs matrices and {} is a vector, {}, choose adam, sgd, sign or signum",
                      named->text, p.name, named->option));
    rows_.push_back({.parameter = &p,
                     .rule = named->rule,
                     .text = named->text,
                     .by = named->by,
                     .sensitivity = named->rule->sensitivity() * sensitivities[rows_.size()],
                     .specs = named->rule->state(group_of(p))});
  }
  for (const Named& named : by_name)
    if (!named.used)
      throw UsageError(
          fmt::format("no tensor has that name, {}, see the names with train_gpt info", named.option));
}

/// Where step sizes come from: they must not exclude each other.
void Optimizer::check_step_sizes() {
  if (options_.sharpness > 0 && options_.escape)
    throw UsageError("a step size has one source, --sharpness and --escape, choose one");
  if (options_.escape) escape_.emplace(*options_.escape);
  std::optional<EscapeOptions> common;
  for (Row& row : rows_) {
    const std::optional<EscapeOptions> own = row.rule->escapes();
    row.needs_anchor = own || options_.escape;
    if (row.rule->hyperball() && (options_.sharpness > 0 || row.parameter->init == Init::zeros))
      throw UsageError(fmt::format("hyperball needs {}, --{} {}, leave hyperball out",
                                   options_.sharpness > 0
                                       ? "a step size that is known before the direction, so no --sharpness"
                                       : row.parameter->name + " to begin with other values than zero",
                                   row.by, row.text));
    if (!own) continue;
    if (measured())
      throw UsageError(fmt::format("{} sets its own step size, --{} {}, leave --sharpness and --escape out",
                                   row.text.substr(0, row.text.find(':')), row.by, row.text));
    if (common && *common != *own)
      throw UsageError(
          fmt::format("all tensors share one escape velocity, --{} {}, give the same eta0, growth and "
                      "coefficient everywhere",
                      row.by, row.text));
    common = own;
  }
  if (common) escape_.emplace(*common);
}

void Optimizer::plan_state() {
  for (Row& row : rows_) {  // rows_ no longer grows: the arena may keep pointers to its tensors
    if (row.rule->hyperball()) row.specs.push_back({.name = "radius", .shape = {}});
    row.state.resize(row.specs.size());
    for (size_t i = 0; i < row.specs.size(); ++i)
      arena_.add(&row.state[i], stacked(row.specs[i].shape, row.parameter->matrices));
    if (row.needs_anchor) arena_.add(&row.anchor, row.parameter->shape);
    row.batch = batch_for(row);
    auto& blocks = batches_[row.batch].group.blocks;
    blocks.resize(blocks.size() + static_cast<size_t>(row.parameter->matrices));  // filled by allocate()
  }
}

Optimizer::~Optimizer() = default;

size_t Optimizer::batch_for(const Row& row) {
  const Group group = group_of(*row.parameter);
  for (size_t i = 0; i < batches_.size(); ++i)
    if (batches_[i].rule == row.rule && batches_[i].sensitivity == row.sensitivity &&
        batches_[i].group.shape == group.shape && batches_[i].group.transposed == group.transposed)
      return i;
  batches_.push_back({.rule = row.rule, .sensitivity = row.sensitivity, .group = group});
  return batches_.size() - 1;
}

int64_t Optimizer::scratch_bytes() const {
  int64_t bytes = sums_of_squares_scratch_bytes(grads_);
  for (const Batch& batch : batches_) {
    bytes = std::max(bytes, batch.rule->scratch_bytes(ctx_, batch.group));
    if (batch.rule->hyperball()) bytes = std::max(bytes, hyperball_scratch_bytes(batch.group));
  }
  return measured() || escape_ ? std::max(bytes, whole_scratch_bytes()) : bytes;
}

void Optimizer::allocate() {
  arena_.allocate(ctx_);
  ctx_.scratch.reserve(scratch_bytes());
  readback_ = std::make_unique<Readback>(ctx_, totals_.size());
  for (Batch& batch : batches_) batch.group.blocks.clear();
  for (size_t i = 0; i < rows_.size(); ++i) grads_[i] = rows_[i].parameter->grad;
  for (Row& row : rows_) {
    const Parameter& p = *row.parameter;
    expect(p.value && p.grad, "optimizer: allocate the parameter table with gradients first");
    for (int i = 0; i < p.matrices; ++i) {
      Block block{
          .weight = block_of(p.value, i, p.matrices), .grad = block_of(p.grad, i, p.matrices), .state = {}};
      if (row.anchor) block.anchor = block_of(row.anchor, i, p.matrices);
      if (p.compute.data != p.value.data) block.compute = block_of(p.compute, i, p.matrices);
      for (size_t k = 0; k < row.state.size(); ++k)
        block.state.push_back(block_of(row.state[k], i, p.matrices).view(row.specs[k].shape));
      batches_[row.batch].group.blocks.push_back(block);
    }
  }
}

void Optimizer::step(int64_t t, int64_t total, bool keep_directions) {
  const int64_t rows = static_cast<int64_t>(rows_.size());
  const Tensor sums = totals_.slice(0, rows);
  if (t == 0) keep_anchors();
  sums_of_squares(ctx_, {.sums = sums, .tensors = grads_});
  clip_factor(
      ctx_,
      {.sums = sums, .limit = options_.grad_clip, .norm = totals_.slice(rows, 1), .scale = grad_scale_});
  readback_->fetch(totals_);
  const double multiplier = options_.schedule.multiplier(t, total), eta = escape_ ? escape_->eta() : 0;
  for (Batch& batch : batches_) batch.lr = multiplied_lr(*batch.rule, multiplier, eta);
  RuleStep step{
      .t = t + 1, .grad_scale = grad_scale_, .clips = options_.grad_clip > 0, .measure = measured()};
  if (escape_) step.eta = step.next_eta = eta, step.first_eta = escape_->first();
  if (escape_ && !options_.escape) {  // the rules measure before they move
    const Measured sums_of_rules = prepare(step);
    step.next_eta = escape_->after(sums_of_rules);
    escape_->update(sums_of_rules);
  }
  const Measured found = directions(step, keep_directions);
  if (options_.escape) escape_->update(found);
  if (options_.sharpness > 0)
    for (Batch& batch : batches_) batch.lr = multiplier * steepest_step(found.dual, options_.sharpness);
  apply();
  const auto hidden =
      std::ranges::find_if(rows_, [](const Row& r) { return r.parameter->role == Role::hidden; });
  const Row& shown = hidden != rows_.end() ? *hidden : rows_.front();
  enqueued_[next_ticket_ % 2] = {.t = t, .lr = batches_[shown.batch].lr, .eta = eta};
}

void Optimizer::keep_anchors() {
  std::vector<Smooth> list;
  for (const Row& row : rows_)
    if (row.anchor) list.push_back({.u = row.anchor, .g = row.parameter->value});
  if (!list.empty()) smooth(ctx_, list);
}

/// What the direction will be multiplied by before the sensitivity; not known yet under a sharpness.
double Optimizer::multiplied_lr(const Rule& rule, double multiplier, double eta) const {
  if (options_.escape) return multiplier * eta;
  return multiplier * rule.lr() * (rule.escapes() ? eta : 1);
}

Measured Optimizer::prepare(const RuleStep& step) {
  Measured sums;
  for (Batch& batch : batches_) {
    if (!batch.rule->escapes()) continue;
    RuleStep own = step;
    own.lr = batch.lr;
    const Measured measured = batch.rule->prepare(ctx_, batch.group, own);
    sums += {.dual = measured.dual / batch.sensitivity, .along = measured.along};
  }
  return sums;
}

Measured Optimizer::directions(RuleStep step, bool keep_directions) {
  Measured sums;
  for (Batch& batch : batches_) {
    const Rule& rule = *batch.rule;
    step.lr = batch.lr;
    const Applying applying{.step = batch.lr / batch.sensitivity,
                            .decay = batch.lr * rule.weight_decay(),
                            .cautious = rule.cautious()};
    batch.applied = rule.fuses() && !keep_directions && !measured() && !rule.hyperball();
    step.apply = batch.applied ? &applying : nullptr;
    const Measured measured = rule.direction(ctx_, batch.group, step);
    if (rule.hyperball()) hyperball(ctx_, batch.group.blocks, applying.step, step.t == 1);
    sums += {.dual = measured.dual / batch.sensitivity, .along = measured.along};
  }
  return sums;
}

void Optimizer::apply() {
  std::vector<ApplyUpdate> list;
  for (const Row& row : rows_) {
    const Parameter& p = *row.parameter;
    const Batch& batch = batches_[row.batch];
    if (batch.applied) continue;
    list.push_back({.w = p.value,
                    .u = p.grad,
                    .copy = p.compute.data == p.value.data ? Tensor{} : p.compute,
                    .step = batch.lr / batch.sensitivity,
                    .decay = batch.lr * row.rule->weight_decay(),
                    .cautious = row.rule->cautious(),
                    .guard = grad_scale_});
  }
  apply_update(ctx_, list);
}

std::vector<RowStep> Optimizer::last_steps() const {
  std::vector<RowStep> steps;
  for (const Row& row : rows_)
    steps.push_back({.parameter = row.parameter,
                     .norm = row.rule->norm(),
                     .step = batches_[row.batch].lr / row.sensitivity,
                     .sensitivity = row.sensitivity});
  return steps;
}

bool Optimizer::capturable() const {
  bool waits = measured() || escape_ || ctx_.profile != nullptr;
  for (const Row& row : rows_) waits = waits || row.rule->waits();
  return !waits;
}

int64_t Optimizer::mark() {
  const int64_t ticket = readback_->mark();
  next_ticket_ = ticket + 1;
  return ticket;
}

StepReport Optimizer::report(int64_t ticket) {
  const std::span<const double> totals = readback_->wait(ticket);
  const Enqueued& enqueued = enqueued_[ticket % 2];
  for (size_t i = 0; i < rows_.size(); ++i)
    if (!std::isfinite(totals[i]))
      throw RunError(
          fmt::format("the gradient of {} is not finite, step {}, lower the learning rate or clip gradients",
                      rows_[i].parameter->name, enqueued.t));
  const double norm = totals.back();
  const bool clipped = options_.grad_clip > 0 && norm > options_.grad_clip;
  return {.step = enqueued.t,
          .grad_norm = norm,
          .clip_scale = clipped ? options_.grad_clip / norm : 1,
          .lr = enqueued.lr,
          .eta = enqueued.eta};
}

std::vector<NamedTensor> Optimizer::state() {
  std::vector<NamedTensor> tensors;
  for (const Row& row : rows_)
    for (size_t i = 0; i < row.state.size(); ++i)
      tensors.push_back(
          {.name = row.parameter->name + "." + row.specs[i].name, .value = row.state[i], .where = &ctx_});
  for (const Row& row : rows_)
    if (row.anchor)
      tensors.push_back({.name = row.parameter->name + ".anchor", .value = row.anchor, .where = &ctx_});
  if (escape_) tensors.push_back({.name = "escape_velocity", .value = escape_->state()});
  return tensors;
}

std::vector<RowInfo> Optimizer::describe() const {
  std::vector<RowInfo> infos;
  for (const Row& row : rows_) {
    const Parameter& p = *row.parameter;
    int64_t state_bytes = 0;
    for (const StateSpec& spec : row.specs) state_bytes += 4 * spec.shape.size() * p.matrices;
    if (row.needs_anchor) state_bytes += 4 * p.size();
    infos.push_back({.parameter = p.name,
                     .role = p.role,
                     .rule = row.text,
                     .norm = row.rule->describe(),
                     .by = row.by,
                     .matrices = p.matrices,
                     .lr = row.rule->lr(),
                     .weight_decay = row.rule->weight_decay(),
                     .sensitivity = row.sensitivity,
                     .state_bytes = state_bytes});
  }
  return infos;
}
