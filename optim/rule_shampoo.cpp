// shampoo and oneside: the gradient between roots of its own second moments.
//
//   L = G G^T, R = G^T G, kept over time:
//     accumulate=ema    L <- beta L + (1 - beta) G G^T, divided by 1 - beta^t (bias_correction=0: not)
//     accumulate=sum    L <- L + G G^T
//     accumulate=none   of this step alone, and of M in the place of G
//   M: the smoothed gradient (momentum, nesterov, ema: Smoothing), with bias_correction a true mean
//   sides=both   u = (L + eps I)^exponent M (R + eps I)^exponent                   exponent -1/4
//   sides=one    u = (L + eps I)^exponent M, or M (R + eps I)^exponent when there are fewer columns; -1/2
//   graft        u takes the length of another direction: adam's (the default), adagrad's or sgd's (graft.h)
//
// Gupta, Koren & Singer, arXiv 1802.09568; equations 12-14 of arXiv 2409.20325, and 15-16: with
// accumulate=none u is U V^T, the dual vector under l2-l2, also of a gradient of any size or rank, so that
// shampoo:accumulate=none,momentum=0,graft=none is spectral:ns=svd. exponent=-0.5 on both sides is Shampoo^2
// (Morwani et al., arXiv 2406.17748), U S^-1 V^T without accumulation.
//
// eps is absolute, in units of G^2: where the eigenvalues of L and R are below it the roots are those of eps,
// and u shrinks with G (grafting gives it its size back). 0 takes pseudo-inverses (root=eigen), which leave
// out what is below 1e-6 of the largest eigenvalue (f32; inverse_root.h). For accumulate=none eps is relative
// to ||M||_F^2. A G beyond 1e18 (f32) enters L and R at that size; one below 1e-22 has no squares, so that L
// and R are zero and u, too, where eps is 0 (but for accumulate=none).
//
// root=eigen is exact and runs on the host, so that a GPU waits; root=newton is made of products: an exponent
// -1/p, `steps` iterations. The roots are renewed at step 1 and every `freq` steps after it; in between they
// are state. For sum and ema that is the price: at a side of n about 10 n^3 operations in float64 by eigen.
//
// Sides beyond `block` are cut into blocks of at most block x block (pieces.h), each of which is a matrix of
// its own, in grafting too; 0: never. State of a matrix that is not cut: L (rows, rows), R (cols, cols), and
// the same for the roots unless freq=1; of one that is, those of all pieces in a row.
//
// Defaults: shampoo as modded-nanogpt ran it at 124M parameters (mean of 0.9, beta 0.95, Adam's size, every
// 10 steps); oneside as R. Anil's entry there: one side, pseudo-inverse, every step, means of 0.9.
//
// Asked for a dual norm it reports <M, u>: exact for accumulate=none without grafting, else what the step
// achieves to first order.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "error.h"
#include "model/kernels/cast.h"
#include "model/kernels/matmul.h"
#include "model/kernels/reduce.h"
#include "optim/at_once.h"
#include "optim/graft.h"
#include "optim/inverse_root.h"
#include "optim/kronecker.h"
#include "optim/pieces.h"
#include "optim/power.h"
#include "optim/update.h"

namespace {
constexpr const char* kAccumulate[] = {"ema", "sum", "none"};
constexpr const char* kSidesNames[] = {"both", "one"};
constexpr const char* kRoots[] = {"eigen", "newton"};

/// Where shampoo and oneside differ.
struct Defaults {
  double lr, wd;
  const char* sides;
  double beta, eps, graft_beta2;
  int64_t freq;
};

class Shampoo final : public Rule {
 public:
  Shampoo(Keyed& keys, const Defaults& defaults) : Rule(keys, defaults.lr, defaults.wd) {
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

  Norm norm() const override { return {NormKind::l2_l2}; }
  std::string describe() const override {
    if (alone()) return "l2-l2";
    return both_ ? "l2-l2, smoothed by L and R" : "l2-l2, smoothed by L or R";
  }
  bool matrices_only() const override { return true; }
  bool waits() const override { return root_ == RootMethod::eigen; }

  std::vector<StateSpec> state(const Group& group) const override { return state_of_shape(group.shape); }
  double work(const Group& group) const override;
  int64_t scratch_bytes(const Context& ctx, const Group& group) const override;
  Measured direction(Context& ctx, Group& group, const RuleStep& step) const override;

 private:
  using Blocks = std::span<const Block>;
  /// The pieces of one size of some blocks, and scratch for them.
  struct Batch {
    Blocks blocks;
    PieceGrid grid;
    int64_t start[2];  // by side: where their factors begin in the tensors of state
    Tensor x, y;       // (pieces, rows, cols), f64 where wide()
    Tensor factors;    // room for (pieces, n, n)
    Tensor narrow;     // as x, in the dtype of the gradients; absent where x is
    int64_t pieces() const { return static_cast<int64_t>(blocks.size()) * grid.count(); }
    /// The pieces of block i among all.
    Tensor of_block(const Tensor& all, size_t i) const {
      return all.slice(static_cast<int64_t>(i) * grid.count(), grid.count());
    }
  };

  std::vector<StateSpec> state_of_shape(const Shape& block) const;
  void read_root(Keyed& keys);
  void gather(Context& ctx, const Batch& batch, const Tensor& to, std::span<const Tensor> from) const;
  bool alone() const { return accumulate_ == "none"; }
  /// Without accumulation the roots belong to a single gradient, whose smallest singular values a Gram matrix
  /// in float32 would lose: their squares. On the host anyway, it is float64 then.
  bool wide(DType dtype) const { return alone() && root_ == RootMethod::eigen && dtype == DType::f32; }
  bool keeps_roots() const { return !alone() && freq_ > 1; }
  bool has(Side side, const PieceGrid& grid) const {
    return both_ || (side == Side::left) == (grid.rows <= grid.cols);
  }
  int64_t largest_side(const PieceGrid& grid) const;
  Tensor state_of(const Block& block, const std::string& name) const;
  Tensor factor(const Batch& batch, size_t block, Side side, const char* suffix) const;
  int64_t batch_bytes(const Context& ctx, const PieceGrid& grid, int64_t pieces, DType dtype) const;
  int64_t at_once_of(const Context& ctx, const Group& group) const;

  template <typename Body>
  void for_each_batch(Context& ctx, Blocks blocks, Body&& body) const;
  void update_factors(Context& ctx, const Batch& batch, const RuleStep& step) const;
  Tensor load_factors(Context& ctx, const Batch& batch, Side side, const char* suffix, double gain) const;
  Tensor current_roots(Context& ctx, const Batch& batch, Side side, const RuleStep& step) const;
  Tensor roots(Context& ctx, const Batch& batch, Side side, const RuleStep& step) const;
  void take_roots(Context& ctx, const Tensor& a) const;
  void smooth_gradients(Context& ctx, Blocks blocks, const RuleStep& step) const;
  double precondition(Context& ctx, const Batch& batch, std::span<const Tensor> grafts,
                      const RuleStep& step) const;
  Measured some_blocks(Context& ctx, Blocks blocks, const RuleStep& step) const;

  Smoothing smoothing_;
  Graft graft_;
  std::string accumulate_;
  bool both_, bias_correction_;
  double beta_ = 0, exponent_, eps_;
  int64_t freq_ = 1, block_;
  RootMethod root_ = RootMethod::eigen;
  int steps_ = 30;
};

constexpr const char* kRootSuffix = "_root";
Tensor flat(const Tensor& x) {
  return x.view({x.shape[0], x.shape[1] * x.shape[2]});
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

int64_t Shampoo::largest_side(const PieceGrid& grid) const {
  int64_t n = 0;
  for (const Side side : kSides)
    if (has(side, grid)) n = std::max(n, side_length(side, grid.rows, grid.cols));
  return n;
}

std::vector<StateSpec> Shampoo::state_of_shape(const Shape& block) const {
  std::vector<StateSpec> specs = smoothing_.state(block);
  if (graft_.keeps_v()) specs.push_back({.name = "v", .shape = block});
  if (alone()) return specs;
  const std::vector<PieceGrid> grids = pieces_of(block, block_);
  for (const char* suffix : {"", kRootSuffix}) {
    if (suffix == kRootSuffix && !keeps_roots()) break;
    for (const Side side : kSides) {
      int64_t size = 0, n = 0;
      for (const PieceGrid& grid : grids)
        if (has(side, grid)) n = side_length(side, grid.rows, grid.cols), size += grid.count() * n * n;
      if (size == 0) continue;
      specs.push_back(
          {.name = factor_name(side) + suffix, .shape = size == n * n ? Shape{n, n} : Shape{size}});
    }
  }
  return specs;
}

/// For a side of n and another of m: a Gram matrix and a product, 4 n^2 m; now and then a root, 10 n^3 by
/// eigen, 8 n^3 a step by newton.
double Shampoo::work(const Group& group) const {
  double sum = Rule::work(group);
  const double root = (root_ == RootMethod::eigen ? 10 : 8.0 * steps_) / static_cast<double>(freq_);
  for (const PieceGrid& grid : pieces_of(group.shape, block_))
    for (const Side side : kSides) {
      if (!has(side, grid)) continue;
      const auto n = static_cast<double>(side_length(side, grid.rows, grid.cols));
      const auto size = static_cast<double>(grid.rows * grid.cols), count = static_cast<double>(grid.count());
      sum += count * (4 * n * size + root * n * n * n);
    }
  return sum;
}

Tensor Shampoo::state_of(const Block& block, const std::string& name) const {
  const std::vector<StateSpec> specs = state_of_shape(block.grad.shape);
  const auto found = std::ranges::find(specs, name, &StateSpec::name);
  return block.state[static_cast<size_t>(found - specs.begin())];
}

/// L or R of the batch's pieces of one block, or with a suffix their roots: (pieces, n, n).
Tensor Shampoo::factor(const Batch& batch, size_t block, Side side, const char* suffix) const {
  const Tensor all = state_of(batch.blocks[block], factor_name(side) + suffix);
  const int64_t n = side_length(side, batch.grid.rows, batch.grid.cols), count = batch.grid.count();
  return all.view({all.size()})
      .slice(batch.start[static_cast<size_t>(side)], count * n * n)
      .view({count, n, n});
}

/// What for_each_batch() and the operations in it take for a batch of so many pieces.
int64_t Shampoo::batch_bytes(const Context& ctx, const PieceGrid& grid, int64_t pieces, DType of) const {
  const int64_t n = largest_side(grid), size = grid.rows * grid.cols;
  const DType dtype = wide(of) ? DType::f64 : of;
  return (wide(of) ? dtype_bytes(of) * pieces * size : 0) +
         dtype_bytes(dtype) * pieces * (2 * size + n * n + 2) +
         std::max({inverse_root_scratch_bytes(ctx, {pieces, n, n}, dtype, root_),
                   row_norms_scratch_bytes(pieces, size), bound_scratch_bytes(pieces, size),
                   whole_scratch_bytes()});
}

/// How many blocks are taken together: at least one for each thread where LAPACK takes the roots.
int64_t Shampoo::at_once_of(const Context& ctx, const Group& group) const {
  int64_t bytes = 0;
  for (const PieceGrid& grid : pieces_of(group.shape, block_))
    bytes = std::max(bytes, batch_bytes(ctx, grid, grid.count(), group.dtype));
  return at_once(ctx, bytes, static_cast<int64_t>(group.blocks.size()),
                 root_ == RootMethod::eigen ? ctx.threads : 1);
}

int64_t Shampoo::scratch_bytes(const Context& ctx, const Group& group) const {
  const int64_t blocks = at_once_of(ctx, group);
  int64_t bytes = whole_scratch_bytes();
  for (const PieceGrid& grid : pieces_of(group.shape, block_))
    bytes = std::max(bytes, batch_bytes(ctx, grid, blocks * grid.count(), group.dtype));
  return bytes + (!graft_.none() ? blocks * dtype_bytes(group.dtype) * group.shape.size() : 0);
}

template <typename Body>
void Shampoo::for_each_batch(Context& ctx, Blocks blocks, Body&& body) const {
  const Tensor& first = blocks[0].grad;
  int64_t start[2] = {0, 0};
  for (const PieceGrid& grid : pieces_of(first.shape, block_)) {
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
  const Blocks all = group.blocks;
  const auto most = static_cast<size_t>(at_once_of(ctx, group));
  Measured measured;
  for (size_t i = 0; i < all.size(); i += most)
    measured += some_blocks(ctx, all.subspan(i, std::min(most, all.size() - i)), step);
  return measured;
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
  smooth_gradients(ctx, blocks, step);
  Measured measured;
  if (step.measure) measured.along = measure_along(ctx, blocks);
  for_each_batch(ctx, blocks,
                 [&](const Batch& batch) { measured.dual += precondition(ctx, batch, grafts, step); });
  return measured;
}

/// M; its weights on the gradients so far add up to 1 - momentum^t, with nesterov to 1 - momentum^(t + 1).
void Shampoo::smooth_gradients(Context& ctx, Blocks blocks, const RuleStep& step) const {
  smoothing_.apply(ctx, blocks, step);
  const double seen = static_cast<double>(step.t) + (smoothing_.nesterov ? 1 : 0);
  const double sum = 1 - std::pow(smoothing_.beta, seen);
  if (!bias_correction_ || !smoothing_.ema || sum == 1 || sum == 0) return;
  std::vector<Smooth> list;
  for (const Block& block : blocks) list.push_back({.u = block.grad, .g = block.grad, .gain = 1 / sum});
  smooth(ctx, list);
}

void Shampoo::update_factors(Context& ctx, const Batch& batch, const RuleStep& step) const {
  gather_pieces(ctx, batch.x, grads_of(batch.blocks), batch.grid);
  bound(ctx, batch.x);
  for (const Side side : kSides) {
    if (!has(side, batch.grid)) continue;
    const Tensor products = room_for(batch.factors, batch.x, side);
    gram(ctx, products, batch.x, side);
    std::vector<StateValue> sums, kept;
    for (size_t i = 0; i < batch.blocks.size(); ++i)
      sums.push_back({factor(batch, i, side, ""), batch.of_block(products, i)});
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

/// u of the batch's pieces in the place of M; returns <M, u> if that is asked for.
double Shampoo::precondition(Context& ctx, const Batch& batch, std::span<const Tensor> grafts,
                             const RuleStep& step) const {
  Scratch::Frame frame(ctx.scratch);
  const Tensor norms = frame.tensor({batch.pieces()}, batch.x.dtype);
  Tensor u = batch.x, spare = batch.y;
  gather(ctx, batch, batch.x, grads_of(batch.blocks));
  if (alone()) {  // at size 1, so that no square vanishes
    row_norms(ctx, {.norms = norms, .x = flat(u)});
    scale_rows(ctx, {.y = flat(u), .x = flat(u), .scales = norms, .divide = true});
  }
  int sides = 0;
  for (const Side side : kSides) {
    if (!has(side, batch.grid)) continue;
    const Tensor root = roots(ctx, batch, side, step);
    const bool left = side == Side::left;
    batched_matmul(ctx, {.c = spare, .a = left ? root : u, .b = left ? u : root});
    std::swap(u, spare);
    ++sides;
  }
  const double size_power = 1 + 2 * exponent_ * sides;
  if (alone() && size_power != 0) {
    power(ctx, {.y = norms, .x = norms, .exponent = size_power});
    scale_rows(ctx, {.y = flat(u), .x = flat(u), .scales = norms});
  }
  if (!grafts.empty()) {
    row_norms(ctx, {.norms = norms, .x = flat(u)});
    scale_rows(ctx, {.y = flat(u), .x = flat(u), .scales = norms, .divide = true});
    gather(ctx, batch, spare, grafts);
    row_norms(ctx, {.norms = norms, .x = flat(spare)});
    scale_rows(ctx, {.y = flat(u), .x = flat(u), .scales = norms});
  }
  double dual = 0;
  if (step.measure) {
    gather(ctx, batch, spare, grads_of(batch.blocks));
    dual = dot(ctx, spare, u);
  }
  if (batch.narrow) cast(ctx, {.y = batch.narrow, .x = u});
  scatter_pieces(ctx, batch.narrow ? batch.narrow : u, grads_of(batch.blocks), batch.grid);
  return dual;
}
}  // namespace

std::unique_ptr<Rule> make_shampoo(Keyed& keys) {
  return std::make_unique<Shampoo>(keys, Defaults{.lr = 0.0018,
                                                  .wd = 0,
                                                  .sides = "both",
                                                  .beta = 0.95,
                                                  .eps = 1e-12,
                                                  .graft_beta2 = 0.95,
                                                  .freq = 10});
}

std::unique_ptr<Rule> make_oneside(Keyed& keys) {
  return std::make_unique<Shampoo>(
      keys,
      Defaults{.lr = 0.01, .wd = 0.1, .sides = "one", .beta = 0.9, .eps = 0, .graft_beta2 = 0.9, .freq = 1});
}
