// What shampoo and oneside do in a step (shampoo.h); what they keep for it is in shampoo_memory.cpp.
#include <fmt/format.h>

#include <cmath>

#include "error.h"
#include "model/kernels/cast.h"
#include "model/kernels/reduce.h"
#include "optim/power.h"
#include "optim/products.h"
#include "optim/shampoo.h"
#include "optim/update.h"

namespace {
constexpr const char* kAccumulate[] = {"ema", "sum", "none"};
constexpr const char* kSidesNames[] = {"both", "one"};
constexpr const char* kRoots[] = {"eigen", "newton"};

Tensor flat(const Tensor& x) {
  return x.view({x.shape[0], x.shape[1] * x.shape[2]});
}
}  // namespace

Shampoo::Shampoo(Keyed& keys, const Defaults& defaults) : Rule(keys, defaults.lr, defaults.wd) {
  smoothing_ = read_smoothing(keys, {.beta = 0.9, .nesterov = false, .ema = true});
  accumulate_ = keys.choice("accumulate", "ema", kAccumulate);
  both_ = keys.choice("sides", defaults.sides, kSidesNames) == std::string("both");
  if (accumulate_ == "ema") beta_ = keys.number("beta", defaults.beta, 0, 0.999999);
  if (!alone()) freq_ = keys.integer("freq", defaults.freq, 1, 1000000);
  bias_correction_ = keys.boolean("bias_correction", true);
  exponent_ = keys.number("exponent", both_ ? -0.25 : -0.5, -4, -1e-3);
  eps_ = keys.number("eps", alone() ? 0 : defaults.eps, 0, 1e6);
  block_ = keys.integer("block", 1024, 0, 1 << 20);
  read_root(keys);
  graft_ = Graft(keys, defaults.graft_beta2);
}

void Shampoo::read_root(Keyed& keys) {
  if (keys.choice("root", "eigen", kRoots) == "eigen") return;
  root_ = RootMethod::newton;
  steps_ = static_cast<int>(keys.integer("steps", 30, 1, 100));
  if (newton_order(exponent_) == 0)
    throw UsageError(
        fmt::format("root=newton needs an exponent -1/p with p = 1 .. 8, {} {}, choose "
                    "root=eigen for {}",
                    keys.option(), keys.name(), exponent_));
}

template <typename Body>
void Shampoo::for_each_batch(Context& ctx, Blocks blocks, Body&& body) const {
  const Tensor& first = blocks[0].grad;
  int64_t start[2] = {0, 0};
  for (const PieceGrid& grid : grids_of(first.shape)) {
    Scratch::Frame frame(ctx.scratch);
    Batch batch{.blocks = blocks,
                .grid = grid,
                .start = {start[0], start[1]},
                .x = {},
                .y = {},
                .factors = {},
                .narrow = {}};
    const int64_t n = largest_side(grid);
    const Shape pieces{batch.pieces(), grid.rows, grid.cols};
    const DType dtype = wide(first.dtype) ? DType::f64 : first.dtype;
    batch.x = frame.tensor(pieces, dtype);
    batch.y = frame.tensor(pieces, dtype);
    batch.factors = frame.tensor({batch.pieces() * n * n}, dtype);
    if (dtype != first.dtype) batch.narrow = frame.tensor(pieces, first.dtype);
    body(batch);
    for (const Side side : kSides) {
      const int64_t length = side_length(side, grid.rows, grid.cols);
      if (has(side, grid)) start[static_cast<size_t>(side)] += grid.count() * length * length;
    }
  }
}

Measured Shampoo::direction(Context& ctx, Group& group, const RuleStep& step) const {
  return some_at_a_time(group.blocks, at_once_of(ctx, group),
                        [&](Blocks blocks) { return some_blocks(ctx, blocks, step); });
}

/// The gradients are read by the factors and by grafting before they are smoothed.
Measured Shampoo::some_blocks(Context& ctx, Blocks blocks, const RuleStep& step) const {
  Scratch::Frame frame(ctx.scratch);
  const Tensor& first = blocks[0].grad;
  if (!alone()) for_each_batch(ctx, blocks, [&](const Batch& batch) { update_factors(ctx, batch, step); });
  std::vector<Tensor> grafts;
  if (!graft_.none()) {
    const auto count = static_cast<int64_t>(blocks.size());
    const Tensor room = frame.tensor({count, first.shape[0], first.shape[1]}, first.dtype);
    std::vector<Tensor> v;
    if (graft_.keeps_v())
      for (const Block& block : blocks) v.push_back(state_of(block, "v"));
    graft_.directions(ctx, room, blocks, v, step);
    for (int64_t i = 0; i < count; ++i) grafts.push_back(room[i]);
  }
  const double gain = smooth_gradients(ctx, blocks, step);
  Measured measured;
  if (step.measure) measured.along = measure_along(ctx, blocks);
  for_each_batch(ctx, blocks,
                 [&](const Batch& batch) { measured.dual += precondition(ctx, batch, gain, grafts, step); });
  return measured;
}

/// What the gradients become, times what is returned, is M. Its weights on the gradients so far add up to 1 -
/// momentum^t, with nesterov to 1 - momentum^(t + 1): divided by that it is a true mean.
double Shampoo::smooth_gradients(Context& ctx, Blocks blocks, const RuleStep& step) const {
  smoothing_.apply(ctx, blocks, step);
  const double seen = static_cast<double>(step.t) + (smoothing_.nesterov ? 1 : 0);
  const double sum = 1 - std::pow(smoothing_.beta, seen);
  const double gain = bias_correction_ && smoothing_.ema && sum != 0 ? 1 / sum : 1;
  if (!step.measure && !alone()) return gain;
  std::vector<Smooth> list;  // M itself is asked for
  for (const Block& block : blocks) list.push_back({.u = block.grad, .g = block.grad, .gain = gain});
  smooth(ctx, list);
  return 1;
}

void Shampoo::update_factors(Context& ctx, const Batch& batch, const RuleStep& step) const {
  gather_pieces(ctx, batch.x, grads_of(batch.blocks), batch.grid);
  bound(ctx, batch.x);
  for (const Side side : kSides) {
    if (!has(side, batch.grid)) continue;
    const Tensor grams = room_for(batch.factors, batch.x, side);
    gram(ctx, grams, batch.x, side);
    std::vector<StateValue> sums, kept;
    for (size_t i = 0; i < batch.blocks.size(); ++i)
      sums.push_back({factor(batch, i, side, ""), batch.of_block(grams, i)});
    const bool ema = accumulate_ == "ema";
    accumulate(ctx, sums, ema ? beta_ : 1, ema ? 1 - beta_ : 1, step);
    if (!keeps_roots() || (step.t - 1) % freq_ != 0) continue;
    const Tensor fresh = current_roots(ctx, batch, side, step);
    for (size_t i = 0; i < batch.blocks.size(); ++i)
      kept.push_back({factor(batch, i, side, kRootSuffix), batch.of_block(fresh, i)});
    keep(ctx, kept, step);
  }
}

/// gain times L or R, or their roots, of all pieces of the batch: (pieces, n, n), in batch.factors.
Tensor Shampoo::load_factors(Context& ctx, const Batch& batch, Side side, const char* suffix,
                             double gain) const {
  const Tensor to = room_for(batch.factors, batch.x, side);
  std::vector<Smooth> list;
  for (size_t i = 0; i < batch.blocks.size(); ++i)
    list.push_back({.u = batch.of_block(to, i), .g = factor(batch, i, side, suffix), .gain = gain});
  smooth(ctx, list);
  return to;
}

/// The roots of L or R as they are now.
Tensor Shampoo::current_roots(Context& ctx, const Batch& batch, Side side, const RuleStep& step) const {
  const bool corrected = accumulate_ == "ema" && bias_correction_;
  const double sum = corrected ? 1 - std::pow(beta_, static_cast<double>(step.t)) : 1;
  const Tensor a = load_factors(ctx, batch, side, "", 1 / sum);
  take_roots(ctx, a);
  return a;
}

/// The roots to multiply with at this step, in batch.factors; batch.x has what accumulate=none takes them of.
Tensor Shampoo::roots(Context& ctx, const Batch& batch, Side side, const RuleStep& step) const {
  if (keeps_roots()) return load_factors(ctx, batch, side, kRootSuffix, 1);
  if (!alone()) return current_roots(ctx, batch, side, step);
  const Tensor a = room_for(batch.factors, batch.x, side);
  gram(ctx, a, batch.x, side);
  take_roots(ctx, a);
  return a;
}

void Shampoo::take_roots(Context& ctx, const Tensor& a) const {
  inverse_root(ctx, {.x = a,
                     .a = a,
                     .power = exponent_,
                     .method = root_,
                     .eps = eps_,
                     .pseudo = root_ == RootMethod::eigen && eps_ == 0,
                     .steps = steps_});
}

/// The pieces of tensors like the gradients, in the dtype of `to`.
void Shampoo::gather(Context& ctx, const Batch& batch, const Tensor& to, std::span<const Tensor> from) const {
  gather_pieces(ctx, batch.narrow ? batch.narrow : to, from, batch.grid);
  if (batch.narrow) cast(ctx, {.y = to, .x = batch.narrow});
}

/// u of the batch's pieces before grafting, in batch.x or batch.y; uses both. What is not cut is multiplied
/// where it lies.
Tensor Shampoo::times_roots(Context& ctx, const Batch& batch, double gain, const RuleStep& step) const {
  Scratch::Frame frame(ctx.scratch);
  const bool in_place = batch.whole() && !alone();
  const Tensor norms = frame.tensor({batch.pieces()}, batch.x.dtype);
  Tensor u = batch.x, spare = batch.y;
  if (!in_place) gather(ctx, batch, u, grads_of(batch.blocks));
  if (alone()) {  // at size 1, so that no square vanishes
    row_norms(ctx, {.norms = norms, .x = flat(u)});
    scale_rows(ctx, {.y = flat(u), .x = flat(u), .scales = norms, .divide = true});
  }
  std::vector<Tensor> x = in_place ? grads_of(batch.blocks) : matrices_of(u);
  int sides = 0;
  for (const Side side : kSides) {
    if (!has(side, batch.grid)) continue;
    std::vector<Tensor> root;
    if (in_place && keeps_roots())
      for (size_t i = 0; i < batch.blocks.size(); ++i) root.push_back(factor(batch, i, side, kRootSuffix)[0]);
    else
      root = matrices_of(roots(ctx, batch, side, step));
    const bool left = side == Side::left;
    products(ctx, {.c = matrices_of(spare),
                   .a = left ? root : x,
                   .b = left ? x : root,
                   .alpha = sides++ == 0 ? gain : 1});
    x = matrices_of(spare);
    std::swap(u, spare);
  }
  const double size_power = 1 + 2 * exponent_ * sides;
  if (alone() && size_power != 0) {
    power(ctx, {.y = norms, .x = norms, .exponent = size_power});
    scale_rows(ctx, {.y = flat(u), .x = flat(u), .scales = norms});
  }
  return u;
}

/// u with the lengths of the other directions: in the place of the gradients where that can be, else of u.
Tensor Shampoo::grafted(Context& ctx, const Batch& batch, const Tensor& u, std::span<const Tensor> grafts,
                        const RuleStep& step) const {
  Scratch::Frame frame(ctx.scratch);
  const Tensor norms = frame.tensor({batch.pieces()}, u.dtype),
               sizes = frame.tensor({batch.pieces()}, u.dtype);
  const Tensor spare = u.data == batch.x.data ? batch.y : batch.x;
  const bool in_place = batch.whole() && !batch.narrow;
  if (!in_place) gather(ctx, batch, spare, grafts);
  row_norms(ctx, {.norms = norms, .x = flat(u)});
  row_norms(ctx, {.norms = sizes, .x = flat(in_place ? stacked(grafts) : spare)});
  const Tensor grads = in_place && !step.measure ? stacked(grads_of(batch.blocks)) : Tensor{};
  const Tensor to = grads ? grads : u;
  scale_rows(ctx, {.y = flat(to), .x = flat(u), .scales = norms, .divide = true, .times = sizes});
  return to;
}

/// u of the batch's pieces in the place of the gradients; returns <M, u> if that is asked for: M is there.
double Shampoo::precondition(Context& ctx, const Batch& batch, double gain, std::span<const Tensor> grafts,
                             const RuleStep& step) const {
  Tensor u = times_roots(ctx, batch, gain, step);
  if (!grafts.empty()) u = grafted(ctx, batch, u, grafts, step);
  if (u.data == batch.blocks[0].grad.data) return 0;
  double dual = 0;
  if (step.measure) {
    const Tensor spare = u.data == batch.x.data ? batch.y : batch.x;
    gather(ctx, batch, spare, grads_of(batch.blocks));
    dual = dot(ctx, spare, u);
  }
  if (batch.narrow) cast(ctx, {.y = batch.narrow, .x = u});
  scatter_pieces(ctx, batch.narrow ? batch.narrow : u, grads_of(batch.blocks), batch.grid);
  return dual;
}
std::unique_ptr<Rule> make_shampoo(Keyed& keys) {
  return std::make_unique<Shampoo>(keys, Shampoo::Defaults{.lr = 0.0018,
                                                           .wd = 0,
                                                           .sides = "both",
                                                           .beta = 0.95,
                                                           .eps = 1e-12,
                                                           .graft_beta2 = 0.95,
                                                           .freq = 10});
}

std::unique_ptr<Rule> make_oneside(Keyed& keys) {
  return std::make_unique<Shampoo>(
      keys, Shampoo::Defaults{
                .lr = 0.01, .wd = 0.1, .sides = "one", .beta = 0.9, .eps = 0, .graft_beta2 = 0.9, .freq = 1});
}
