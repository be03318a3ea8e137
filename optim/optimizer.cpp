#include "optim/optimizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "error.h"
#include "model/kernels/reduce.h"
#include "optim/modular.h"
#include "optim/update.h"

struct Optimizer::Row {
  Parameter* parameter;
  const Rule* rule;
  std::vector<StateSpec> specs;    // per block
  std::vector<Tensor> state = {};  // of the whole parameter: the blocks' states stacked
  size_t batch = 0;                // where its blocks are
};

struct Optimizer::Batch {
  const Rule* rule;
  Group group;
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
  for (const auto& [role, text] : options_.rules) rules_[role] = make_rule(option_of(role), text);
  for (Parameter& p : table_) {
    const auto found = rules_.find(p.role);
    if (found == rules_.end())
      throw UsageError(fmt::format("no rule for {}, {}, give one such as {} adam", p.name, option_of(p.role),
                                   option_of(p.role)));
    const Rule* rule = found->second.get();
    if (rule->matrices_only() && !p.is_matrix())
      throw UsageError(
          fmt::format("'{}' needs matrices and {} is a vector, {}, choose adam, sgd, sign or signum",
                      options_.rules.at(p.role), p.name, option_of(p.role)));
    rows_.push_back({.parameter = &p, .rule = rule, .specs = rule->state(block_shape(p))});
  }
  for (Row& row : rows_) {  // rows_ no longer grows: the arena may keep pointers to its tensors
    row.state.resize(row.specs.size());
    for (size_t i = 0; i < row.specs.size(); ++i)
      arena_.add(&row.state[i], stacked(row.specs[i].shape, row.parameter->matrices));
    row.batch = batch_for(row);
    auto& blocks = batches_[row.batch].group.blocks;
    blocks.resize(blocks.size() + static_cast<size_t>(row.parameter->matrices));  // filled by allocate()
  }
  grads_.resize(rows_.size());
  for (size_t i = 0; i < rows_.size(); ++i) grads_[i].shape = rows_[i].parameter->shape;
  arena_.add(&totals_, DType::f64, {static_cast<int64_t>(rows_.size()) + 1});
  arena_.add(&grad_scale_, {1});
}

Optimizer::~Optimizer() = default;

size_t Optimizer::batch_for(const Row& row) {
  const Group group{
      .shape = block_shape(*row.parameter), .transposed = row.parameter->stored_transposed(), .blocks = {}};
  for (size_t i = 0; i < batches_.size(); ++i)
    if (batches_[i].rule == row.rule && batches_[i].group.shape == group.shape &&
        batches_[i].group.transposed == group.transposed)
      return i;
  batches_.push_back({.rule = row.rule, .group = group});
  return batches_.size() - 1;
}

int64_t Optimizer::scratch_bytes() const {
  int64_t bytes = sums_of_squares_scratch_bytes(grads_);
  for (const Batch& batch : batches_) bytes = std::max(bytes, batch.rule->scratch_bytes(ctx_, batch.group));
  return bytes;
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
      for (size_t k = 0; k < row.state.size(); ++k)
        block.state.push_back(block_of(row.state[k], i, p.matrices).view(row.specs[k].shape));
      batches_[row.batch].group.blocks.push_back(block);
    }
  }
}

void Optimizer::step(int64_t t, int64_t total) {
  const int64_t rows = static_cast<int64_t>(rows_.size());
  const Tensor sums = totals_.slice(0, rows);
  sums_of_squares(ctx_, {.sums = sums, .tensors = grads_});
  clip_factor(
      ctx_,
      {.sums = sums, .limit = options_.grad_clip, .norm = totals_.slice(rows, 1), .scale = grad_scale_});
  readback_->fetch(totals_);
  const bool by_sharpness = options_.sharpness > 0;
  const double dual = directions(
      {.t = t + 1, .grad_scale = grad_scale_, .clips = options_.grad_clip > 0, .want_dual = by_sharpness});
  const double eta = by_sharpness ? steepest_step(dual, options_.sharpness) : 0;
  const double multiplier = options_.schedule.multiplier(t, total);
  apply(multiplier, eta);
  const auto hidden = rules_.find(Role::hidden);
  const double lr = by_sharpness ? eta : (hidden != rules_.end() ? hidden->second->lr() : 0);
  enqueued_[next_ticket_ % 2] = {.t = t, .lr = multiplier * lr};
}

double Optimizer::directions(const RuleStep& step) {
  double dual = 0;
  for (Batch& batch : batches_)
    dual += batch.rule->direction(ctx_, batch.group, step) / batch.rule->sensitivity();
  return dual;
}

void Optimizer::apply(double multiplier, double eta) {
  std::vector<ApplyUpdate> list;
  for (const Row& row : rows_) {
    const Parameter& p = *row.parameter;
    const double lr = multiplier * (options_.sharpness > 0 ? eta : row.rule->lr());
    list.push_back({.w = p.value,
                    .u = p.grad,
                    .copy = p.compute.data == p.value.data ? Tensor{} : p.compute,
                    .step = static_cast<float>(lr / row.rule->sensitivity()),
                    .decay = static_cast<float>(lr * row.rule->weight_decay()),
                    .cautious = row.rule->cautious(),
                    .guard = grad_scale_});
  }
  apply_update(ctx_, list);
}

bool Optimizer::capturable() const {
  bool waits = options_.sharpness > 0 || ctx_.profile != nullptr;
  for (const Row& row : rows_) waits = waits || row.rule->on_host();
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
          .lr = enqueued.lr};
}

std::vector<NamedTensor> Optimizer::state() {
  std::vector<NamedTensor> tensors;
  for (const Row& row : rows_)
    for (size_t i = 0; i < row.state.size(); ++i)
      tensors.push_back(
          {.name = row.parameter->name + "." + row.specs[i].name, .value = row.state[i], .where = &ctx_});
  return tensors;
}

std::vector<RowInfo> Optimizer::describe() const {
  std::vector<RowInfo> infos;
  for (const Row& row : rows_) {
    const Parameter& p = *row.parameter;
    int64_t state_bytes = 0;
    for (const StateSpec& spec : row.specs) state_bytes += 4 * spec.shape.size() * p.matrices;
    infos.push_back({.parameter = p.name,
                     .role = p.role,
                     .rule = options_.rules.at(p.role),
                     .norm = row.rule->norm_name(),
                     .matrices = p.matrices,
                     .lr = row.rule->lr(),
                     .weight_decay = row.rule->weight_decay(),
                     .sensitivity = row.rule->sensitivity(),
                     .state_bytes = state_bytes});
  }
  return infos;
}
