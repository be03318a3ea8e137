// soap: Adam in the eigenbasis of Shampoo's factors.
//
//   G' = Q_L^T G Q_R,   m = beta1 m + (1 - beta1) G,   m' = Q_L^T m Q_R
//   v = beta2 v + (1 - beta2) G'^2
//   u = Q_L (m' / (1 - beta1^s)  /  (sqrt(v / (1 - beta2^s)) + eps)) Q_R^T        0 / 0 = 0;  s = t - 1
//   L = beta L + (1 - beta) G G^T,   R = beta R + (1 - beta) G^T G
//   Q_L, Q_R: eigenvectors of L, R at step 1; afterwards, at every `freq`-th step, of Q_L <- qr(L Q_L), one
//   step of orthogonal iteration, which keeps the columns in their order, so that v stays meaningful
//
// Vyas et al., arXiv 2409.11321, Algorithm 3, and as its authors do it the first step only looks: u = 0, and
// L, R and the bases begin. The basis always comes from earlier gradients. In that of the gradient itself G'
// is diagonal, and all the rest of it rounding, which Adam would divide by its own size.
//
// sides=one rotates the smaller side alone, and a side beyond `max_side` is not rotated: its Q is the
// identity and has no state. With neither side rotated u is Adam's, a step late.
//
// Two remarks on gradients that lack rank. Directions that no gradient so far has had belong to eigenvalue 0,
// and which basis of them is used is rounding's choice (with fewer rows than columns that is so for the first
// steps, on the right). Where a gradient has nothing in its basis but rounding, about 1e-7 |G| in f32, eps is
// what keeps that small: it should lie above. Below it, u has anything there: m' and G' round differently,
// and where G' happens to be 0, m' / sqrt(v) is a rounding error over eps. Gradients below 1e-20 have no
// squares in f32 and leave the bases as they are; those beyond 1e18 enter L and R at that size.
//
// v and the bases are in the coordinates of the bases; m is in those of the weight. Bases are computed on the
// host in float64 (eigen.h), so that a GPU waits at those steps. Asked for a dual norm it reports <m, u>,
// what the step achieves to first order.
#include <cmath>

#include "model/kernels/matmul.h"
#include "model/kernels/reduce.h"
#include "optim/at_once.h"
#include "optim/eigen.h"
#include "optim/kronecker.h"
#include "optim/pieces.h"
#include "optim/update.h"

namespace {
constexpr const char* kSidesNames[] = {"both", "one"};

class Soap final : public Rule {
 public:
  explicit Soap(Keyed& keys)
      : Rule(keys, 0.0018),
        beta1_(keys.number("beta1", 0.95, 0, 0.999999)),
        beta2_(keys.number("beta2", 0.95, 0, 0.999999)),
        eps_(keys.number("eps", 1e-8, 0, 1e6)),  // above 1e-7 |G|
        beta_(keys.number("beta", 0.95, 0, 0.999999)),
        freq_(keys.integer("freq", 10, 1, 1000000)),
        both_(keys.choice("sides", "both", kSidesNames) == "both"),
        max_side_(keys.integer("max_side", 8192, 1, 1 << 20)) {}

  Norm norm() const override { return {NormKind::l2_l2}; }
  std::string describe() const override { return "l2-l2, smoothed by Adam in the basis of L and R"; }
  bool matrices_only() const override { return true; }
  bool waits() const override { return true; }

  std::vector<StateSpec> state(const Group& group) const override {
    const Shape& block = group.shape;
    std::vector<StateSpec> specs;
    if (beta1_ > 0) specs.push_back({.name = "m", .shape = block});
    if (beta2_ > 0) specs.push_back({.name = "v", .shape = block});
    for (const Side side : kSides) {
      if (!rotates(side, block)) continue;
      const int64_t n = side_length(side, block[0], block[1]);
      const std::string name = factor_name(side);
      specs.push_back({.name = name, .shape = {n, n}});
      specs.push_back({.name = name + "_basis", .shape = {n, n}});
    }
    return specs;
  }

  /// For a side of n and another of m: three rotations and a Gram matrix, 8 n^2 m; now and then a product and
  /// its QR, 6 n^3.
  double work(const Group& group) const override {
    double sum = Rule::work(group);
    for (const Side side : kSides) {
      if (!rotates(side, group.shape)) continue;
      const auto n = static_cast<double>(side_length(side, group.shape[0], group.shape[1]));
      sum += 8 * n * static_cast<double>(group.shape.size()) + 6 * n * n * n / static_cast<double>(freq_);
    }
    return sum;
  }
  int64_t scratch_bytes(const Context& ctx, const Group& group) const override;
  Measured direction(Context& ctx, Group& group, const RuleStep& step) const override;

 private:
  using Blocks = std::span<const Block>;
  /// Scratch for some blocks: three rooms (blocks, rows, cols), which trade names, and bases by side (blocks,
  /// n, n), absent where the side is not rotated.
  struct Batch {
    Blocks blocks;
    PieceGrid grid;  // one piece: the whole matrix
    Tensor g, m, spare;
    Tensor bases[2];
  };

  bool rotates(Side side, const Shape& block) const {
    return side_length(side, block[0], block[1]) <= max_side_ &&
           (both_ || (side == Side::left) == (block[0] <= block[1]));
  }
  /// The factor of this side; its basis is the next tensor of state.
  size_t factor_index(Side side, const Shape& block) const {
    const size_t moments = (beta1_ > 0 ? 1 : 0) + (beta2_ > 0 ? 1 : 0);
    return moments + (side == Side::right && rotates(Side::left, block) ? 2 : 0);
  }
  int64_t batch_bytes(const Context& ctx, const Shape& block, int64_t blocks, DType dtype) const;
  /// How many blocks are taken together: at least one for each thread, as LAPACK renews their bases.
  int64_t at_once_of(const Context& ctx, const Group& group) const {
    return at_once(ctx, batch_bytes(ctx, group.shape, 1, group.dtype), std::ssize(group.blocks), ctx.threads);
  }
  Measured some_blocks(Context& ctx, Blocks blocks, const RuleStep& step) const;
  void load_bases(Context& ctx, const Batch& batch) const;
  void rotate(Context& ctx, Batch& batch, Tensor& x, bool back) const;
  void adam(Context& ctx, Batch& batch, const RuleStep& step) const;
  void update_factors(Context& ctx, const Batch& batch, const RuleStep& step) const;
  void update_bases(Context& ctx, const Batch& batch, Side side, const RuleStep& step) const;
  Measured finish(Context& ctx, const Batch& batch, const RuleStep& step) const;

  double beta1_, beta2_, eps_, beta_;
  int64_t freq_;
  bool both_;
  int64_t max_side_;
};

/// What some_blocks() takes for so many.
int64_t Soap::batch_bytes(const Context& ctx, const Shape& block, int64_t blocks, DType dtype) const {
  int64_t elements = 3 * block.size(), host = 0;
  for (const Side side : kSides) {
    if (!rotates(side, block)) continue;
    const int64_t n = side_length(side, block[0], block[1]);
    elements += n * n + n;
    host = std::max({host, symmetric_eigen_scratch_bytes(ctx, n), qr_scratch_bytes(ctx, n, n, blocks)});
  }
  return blocks * elements * dtype_bytes(dtype) +
         std::max({host, whole_scratch_bytes(), bound_scratch_bytes(blocks, block.size())});
}

int64_t Soap::scratch_bytes(const Context& ctx, const Group& group) const {
  return batch_bytes(ctx, group.shape, at_once_of(ctx, group), group.dtype);
}

Measured Soap::direction(Context& ctx, Group& group, const RuleStep& step) const {
  const Blocks all = group.blocks;
  const auto most = static_cast<size_t>(at_once_of(ctx, group));
  Measured measured;
  for (size_t i = 0; i < all.size(); i += most)
    measured += some_blocks(ctx, all.subspan(i, std::min(most, all.size() - i)), step);
  return measured;
}

Measured Soap::some_blocks(Context& ctx, Blocks blocks, const RuleStep& step) const {
  Scratch::Frame frame(ctx.scratch);
  const Tensor& first = blocks[0].grad;
  const auto count = static_cast<int64_t>(blocks.size());
  const int64_t rows = first.shape[0], cols = first.shape[1];
  Batch batch{.blocks = blocks,
              .grid = {.rows = rows, .cols = cols},
              .g = frame.tensor({count, rows, cols}, first.dtype),
              .m = frame.tensor({count, rows, cols}, first.dtype),
              .spare = frame.tensor({count, rows, cols}, first.dtype),
              .bases = {}};
  for (const Side side : kSides) {
    const int64_t n = side_length(side, rows, cols);
    if (rotates(side, first.shape))
      batch.bases[static_cast<size_t>(side)] = frame.tensor({count, n, n}, first.dtype);
  }
  if (step.t == 1) {
    update_factors(ctx, batch, step);
    std::vector<Smooth> nothing;  // 0 G, which is not 0 where G is not finite
    for (const Block& block : blocks) nothing.push_back({.u = block.grad, .g = block.grad, .gain = 0});
    smooth(ctx, nothing);
    return {};
  }
  load_bases(ctx, batch);
  adam(ctx, batch, step);
  update_factors(ctx, batch, step);
  return finish(ctx, batch, step);
}

void Soap::load_bases(Context& ctx, const Batch& batch) const {
  std::vector<Smooth> list;
  for (const Side side : kSides)
    for (size_t i = 0; i < batch.blocks.size(); ++i) {
      const Block& block = batch.blocks[i];
      if (rotates(side, block.grad.shape))
        list.push_back({.u = batch.bases[static_cast<size_t>(side)][static_cast<int64_t>(i)],
                        .g = block.state[factor_index(side, block.grad.shape) + 1]});
    }
  if (!list.empty()) smooth(ctx, list);
}

/// x <- Q_L^T x Q_R, or back: Q_L x Q_R^T.
void Soap::rotate(Context& ctx, Batch& batch, Tensor& x, bool back) const {
  const auto& [left, right] = batch.bases;
  if (left) {
    batched_matmul(ctx, {.c = batch.spare, .a = left, .b = x, .transpose_a = !back});
    std::swap(x, batch.spare);
  }
  if (right) {
    batched_matmul(ctx, {.c = batch.spare, .a = x, .b = right, .transpose_b = back});
    std::swap(x, batch.spare);
  }
}

/// Moments of all blocks, and their directions in batch.g; the gradients stay. Rotating is linear: m' after
/// the step is the mean of the rotated old m and G'.
void Soap::adam(Context& ctx, Batch& batch, const RuleStep& step) const {
  gather_pieces(ctx, batch.g, grads_of(batch.blocks), batch.grid);
  rotate(ctx, batch, batch.g, /*back=*/false);
  if (beta1_ > 0) {
    std::vector<Tensor> moments;
    for (const Block& block : batch.blocks) moments.push_back(block.state.front());
    gather_pieces(ctx, batch.m, moments, batch.grid);
    rotate(ctx, batch, batch.m, /*back=*/false);
  }
  const double steps = static_cast<double>(step.t - 1);
  std::vector<AdamDirection> directions;
  std::vector<Smooth> means;
  for (size_t i = 0; i < batch.blocks.size(); ++i) {
    const Block& block = batch.blocks[i];
    const Tensor rotated = batch.g[static_cast<int64_t>(i)];
    directions.push_back({.u = rotated,
                          .m = beta1_ > 0 ? batch.m[static_cast<int64_t>(i)] : Tensor{},
                          .v = beta2_ > 0 ? block.state[beta1_ > 0 ? 1 : 0] : Tensor{},
                          .g = rotated,
                          .beta1 = beta1_,
                          .beta2 = beta2_,
                          .eps = eps_,
                          .correction1 = 1 - std::pow(beta1_, steps),
                          .correction2 = 1 - std::pow(beta2_, steps),
                          .scale = step.grad_scale});
    if (beta1_ > 0)
      means.push_back({.m = block.state.front(),
                       .g = block.grad,
                       .beta = beta1_,
                       .gain = 1 - beta1_,
                       .scale = step.grad_scale});
  }
  adam_direction(ctx, directions);
  if (!means.empty()) smooth(ctx, means);
  rotate(ctx, batch, batch.g, /*back=*/true);
}

/// Of the gradients, which it gathers in batch.m; the bases of this step are no longer needed.
void Soap::update_factors(Context& ctx, const Batch& batch, const RuleStep& step) const {
  const Shape& shape = batch.blocks[0].grad.shape;
  gather_pieces(ctx, batch.m, grads_of(batch.blocks), batch.grid);
  bound(ctx, batch.m);
  for (const Side side : kSides) {
    if (!rotates(side, shape)) continue;
    const Tensor& products = batch.bases[static_cast<size_t>(side)];
    gram(ctx, products, batch.m, side);
    std::vector<StateValue> list;
    for (size_t i = 0; i < batch.blocks.size(); ++i)
      list.push_back({batch.blocks[i].state[factor_index(side, shape)], products[static_cast<int64_t>(i)]});
    accumulate(ctx, list, beta_, 1 - beta_, step);
    if (step.t == 1 || (step.t - 1) % freq_ == 0) update_bases(ctx, batch, side, step);
  }
}

/// Eigenvectors are found one matrix after the other, which happens once.
void Soap::update_bases(Context& ctx, const Batch& batch, Side side, const RuleStep& step) const {
  std::vector<StateValue> list;
  std::vector<Qr> products;
  for (size_t i = 0; i < batch.blocks.size(); ++i) {
    const Block& block = batch.blocks[i];
    const size_t index = factor_index(side, block.grad.shape);
    const Tensor factor = block.state[index], basis = block.state[index + 1];
    const Tensor fresh = batch.bases[static_cast<size_t>(side)][static_cast<int64_t>(i)];
    const int64_t n = factor.shape[0];
    if (step.t == 1) {
      Scratch::Frame frame(ctx.scratch);
      symmetric_eigen(ctx, {.values = frame.tensor({n}, factor.dtype), .vectors = fresh, .a = factor});
    } else {
      batched_matmul(ctx,
                     {.c = fresh.view({1, n, n}), .a = factor.view({1, n, n}), .b = basis.view({1, n, n})});
      products.push_back({.q = fresh, .x = fresh});
    }
    list.push_back({basis, fresh});
  }
  qr(ctx, products);
  keep(ctx, list, step);
}

/// The directions take the place of the gradients, which become m if <m, u> is asked for.
Measured Soap::finish(Context& ctx, const Batch& batch, const RuleStep& step) const {
  Measured measured;
  if (step.measure) {
    const double correction = 1 - std::pow(beta1_, static_cast<double>(step.t - 1));
    std::vector<Smooth> means;
    for (const Block& block : batch.blocks)
      means.push_back(beta1_ > 0 ? Smooth{.u = block.grad, .g = block.state.front(), .gain = 1 / correction}
                                 : Smooth{.u = block.grad, .g = block.grad, .scale = step.grad_scale});
    smooth(ctx, means);
    measured.along = measure_along(ctx, batch.blocks);
    for (size_t i = 0; i < batch.blocks.size(); ++i)
      measured.dual += dot(ctx, batch.blocks[i].grad, batch.g[static_cast<int64_t>(i)]);
  }
  scatter_pieces(ctx, batch.g, grads_of(batch.blocks), batch.grid);
  return measured;
}
}  // namespace

std::unique_ptr<Rule> make_soap(Keyed& keys) {
  return std::make_unique<Soap>(keys);
}
