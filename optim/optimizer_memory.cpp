// What an optimizer keeps, where and on which rank: planned, taken, and listed for checkpoints and for
// people.
#include <algorithm>

#include "error.h"
#include "model/kernels/reduce.h"
#include "optim/optimizer_parts.h"

namespace {
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

Tensor rows_of(const Tensor& tensor, const Piece& piece) {
  return tensor.slice(piece.first, piece.rows);
}

/// The bf16 copy of a parameter that products read; absent when they read the weight.
Tensor copy_of(const Parameter& p) {
  return p.compute.data == p.value.data ? Tensor{} : p.compute;
}
}  // namespace

Optimizer::Optimizer(Context& ctx, ParameterTable& table, const OptimizerOptions& options)
    : ctx_(ctx),
      options_(options),
      assignment_(assign_rules(table, options)),
      owners_(owners_of(assignment_, ctx.comm->size())),
      agreement_(ctx, arena_, std::ssize(owners_.pieces()), options.grad_clip,
                 options.measured() || assignment_.velocity) {
  if (assignment_.velocity) escape_.emplace(*assignment_.velocity);
  if (!ctx.comm->alone()) table.keep_masters(owned_rows());
  plan_state();
  plan_memory();
}

Optimizer::~Optimizer() = default;

std::vector<OwnedRows> Optimizer::owned_rows() const {
  std::vector<OwnedRows> owned;
  for (const Piece& piece : owners_.pieces())
    owned.push_back(
        {.parameter = piece.parameter, .first = piece.first, .rows = piece.rows, .owner = piece.owner});
  return owned;
}

const AssignedRule& Optimizer::row_of(const Shard& shard) const {
  return assignment_.rows[shard.piece.parameter];
}

void Optimizer::plan_state() {
  for (const Piece& piece : owners_.pieces())
    shards_.push_back(
        {.piece = piece, .specs = state_of(assignment_.rows[piece.parameter], piece), .state = {}});
  squared_.resize(shards_.size());
  for (size_t i = 0; i < shards_.size();
       ++i) {  // shards_ no longer grows: plan_memory() may give the arena pointers to its tensors
    Shard& shard = shards_[i];
    const AssignedRule& row = row_of(shard);
    const Piece& piece = shard.piece;
    const Shape& whole = row.parameter->shape;
    const Shape rows = whole.rank() == 2 ? Shape{piece.rows, whole[1]} : Shape{piece.rows};
    for (const StateSpec& spec : shard.specs) {
      shard.state.emplace_back(nullptr, DType::f32, stacked(spec.shape, piece.matrices));
      expect(
          piece.rows % (whole[0] / row.parameter->matrices) == 0 || shard.state.back().shape[0] == piece.rows,
          "optimizer: a rule that treats rows apart keeps state by rows");
    }
    if (row.needs_anchor) shard.anchor.shape = rows;
    squared_[i].shape = Shape{0};
    shard.batch = batch_for(piece);
    if (!mine(piece)) continue;
    squared_[i].shape = rows;
    Group& group = batches_[shard.batch].group;
    group.shape = group_of(*row.parameter, piece).shape;
    group.blocks.resize(group.blocks.size() + static_cast<size_t>(piece.matrices));  // filled by allocate()
    if (const int64_t count = count_of(row.rule->lengths(group), group.shape); count > 0)
      shard.lengths.shape = squared_[i].shape = {piece.matrices * count};
  }
}

/// In banks, as the parameters are: one state of all matrices of a batch, then the next. The
/// banks of up to four states begin at other places of a page than weights (0) and gradients (4), as long as
/// matrices are whole pages: see Arena.
void Optimizer::plan_memory() {
  for (size_t b = 0; b < batches_.size(); ++b) {
    std::vector<Shard*> own;
    size_t states = 0;
    for (Shard& shard : shards_)
      if (shard.batch == b && mine(shard.piece)) own.push_back(&shard), states = shard.state.size();
    for (size_t k = 0; k < states; ++k) {
      arena_.move_to(static_cast<int64_t>(8 + 3 * k));
      for (Shard* shard : own) arena_.add(&shard->state[k], shard->state[k].shape);
    }
    for (Shard* shard : own) {
      if (row_of(*shard).needs_anchor) arena_.add(&shard->anchor, shard->anchor.shape);
      if (!measures_first()) continue;
      shard->aside.resize(states);
      for (size_t k = 0; k < states; ++k) arena_.add(&shard->aside[k], shard->state[k].shape);
    }
    for (Shard* shard : own)
      if (shard->lengths.shape.rank() > 0) arena_.add(&shard->lengths, shard->lengths.shape);
  }
}

/// Parameters of one shape are cut alike, so that a rank's pieces of them have one shape, too.
size_t Optimizer::batch_for(const Piece& piece) {
  const AssignedRule& row = assignment_.rows[piece.parameter];
  const Parameter& p = *row.parameter;
  const Shape block = p.is_matrix() ? Shape{p.shape[0] / p.matrices, p.shape[1]} : p.shape;
  const auto fits = [&](const Batch& batch) {
    return batch.rule == row.rule && batch.sensitivity == row.sensitivity && batch.block == block &&
           batch.group.transposed == p.stored_transposed();
  };
  auto found = std::ranges::find_if(batches_, fits);
  if (found == batches_.end())
    found = batches_.insert(
        found,
        {.rule = row.rule, .sensitivity = row.sensitivity, .block = block, .group = group_of(p, piece)});
  auto& parameters = found->parameters;
  if (parameters.empty() || parameters.back() != piece.parameter) parameters.push_back(piece.parameter);
  return static_cast<size_t>(found - batches_.begin());
}

int64_t Optimizer::scratch_bytes() const {
  int64_t bytes = sums_of_squares_scratch_bytes(squared_);
  for (const Batch& batch : batches_) {
    if (batch.group.blocks.empty()) continue;
    bytes = std::max(bytes, batch.rule->scratch_bytes(ctx_, batch.group));
    if (batch.rule->hyperball()) bytes = std::max(bytes, ball_scratch_bytes(ctx_, batch.group));
  }
  return options_.measured() || escape_ ? std::max(bytes, whole_scratch_bytes()) : bytes;
}

void Optimizer::allocate() {
  arena_.allocate(ctx_);
  ctx_.scratch.reserve(scratch_bytes());
  agreement_.allocate();
  for (Batch& batch : batches_) batch.group.blocks.clear();
  for (size_t i = 0; i < shards_.size(); ++i) {
    const Parameter& p = *row_of(shards_[i]).parameter;
    expect(p.compute && p.grad, "optimizer: allocate the parameter table with gradients first");
    if (!mine(shards_[i].piece)) continue;
    squared_[i] = shards_[i].lengths ? shards_[i].lengths : rows_of(p.grad, shards_[i].piece);
    add_blocks(shards_[i]);
  }
}

void Optimizer::add_blocks(const Shard& shard) {
  const Parameter& p = *row_of(shard).parameter;
  const int count = shard.piece.matrices;
  const Tensor value = p.master(shard.piece.first, shard.piece.rows), grad = rows_of(p.grad, shard.piece);
  for (int i = 0; i < count; ++i) {
    Block block{.weight = block_of(value, i, count), .grad = block_of(grad, i, count), .state = {}};
    if (shard.anchor) block.anchor = block_of(shard.anchor, i, count);
    if (shard.lengths) block.lengths = block_of(shard.lengths, i, count);
    if (copy_of(p)) block.compute = block_of(rows_of(p.compute, shard.piece), i, count);
    for (size_t k = 0; k < shard.state.size(); ++k)
      block.state.push_back(block_of(shard.state[k], i, count).view(shard.specs[k].shape));
    batches_[shard.batch].group.blocks.push_back(block);
  }
}

/// Rows of a tensor of state lie as those of the parameter do, but for a factor: a block has its share of
/// both.
NamedTensor Optimizer::named(const Shard& shard, const std::string& suffix, const Tensor& value) {
  const Parameter& p = *row_of(shard).parameter;
  const Piece& piece = shard.piece;
  NamedTensor tensor{.name = p.name + suffix, .value = value, .where = &ctx_};
  if (piece.rows == p.shape[0]) return tensor;
  tensor.first_row = piece.first * value.shape[0] / piece.rows;
  tensor.all_rows = p.shape[0] * value.shape[0] / piece.rows;
  return tensor;
}

std::vector<NamedTensor> Optimizer::state() {
  if (escape_) settle(agreement_.total(unsettled_));
  std::vector<NamedTensor> tensors;
  for (auto first = shards_.begin(); first != shards_.end();) {
    const auto end =
        std::find_if(first, shards_.end(), [&](const Shard& s) { return &row_of(s) != &row_of(*first); });
    for (size_t k = 0; k < first->specs.size(); ++k)
      for (auto shard = first; shard != end; ++shard)
        tensors.push_back(named(*shard, "." + shard->specs[k].name, shard->state[k]));
    first = end;
  }
  for (const Shard& shard : shards_)
    if (row_of(shard).needs_anchor) tensors.push_back(named(shard, ".anchor", shard.anchor));
  if (escape_) tensors.push_back({.name = "escape_velocity", .value = escape_->state()});
  return tensors;
}

std::vector<RowInfo> Optimizer::describe(int ranks) const {
  return describe_rows(assignment_, ranks == 0 ? owners_ : owners_of(assignment_, ranks));
}

RankInfo Optimizer::most_of_a_rank(int ranks) const {
  RankInfo most;
  for (const RankInfo& rank : ::describe_ranks(assignment_, owners_of(assignment_, ranks)))
    most = {.pieces = std::max(most.pieces, rank.pieces),
            .parameters = std::max(most.parameters, rank.parameters),
            .state_bytes = std::max(most.state_bytes, rank.state_bytes),
            .aside_bytes = std::max(most.aside_bytes, rank.aside_bytes),
            .work = std::max(most.work, rank.work)};
  return most;
}

std::string Optimizer::describe_ranks(int ranks) const {
  const Owners owners = ranks == 0 ? owners_ : owners_of(assignment_, ranks);
  return ranks_table(::describe_ranks(assignment_, owners), owners.imbalance());
}
