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

#include "model/kernels/reduce.h"
#include "optim/at_once.h"
#include "optim/eigen.h"
#include "optim/kronecker.h"
#include "optim/pieces.h"
#include "optim/products.h"
#include "optim/update.h"

namespace {
constexpr const char* kSidesNames[] = {"both", "one"};

/// to = Q_L^T x Q_R, or back: Q_L x Q_R^T. Lists of matrices; `to` overlaps no x.
struct Rotation {
  std::span<const Tensor> to, x;
  bool back = false;
};

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
  /// Some blocks, and scratch for them.
  struct Batch {
    Blocks blocks;
    Tensor g, m, spare;  // (blocks, rows, cols)
    Tensor factors;      // room for (blocks, n, n)
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
  std::vector<Tensor> bases(Blocks blocks, Side side) const;
  void rotate(Context& ctx, const Batch& batch, const Rotation& args) const;
  void adam(Context& ctx, const Batch& batch, const RuleStep& step) const;
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
  int64_t factor = 0, values = 0, host = 0;
  for (const Side side : kSides) {
    if (!rotates(side, block)) continue;
    const int64_t n = side_length(side, block[0], block[1]);
    factor = std::max(factor, n * n), values = std::max(values, n);
    host = std::max({host, symmetric_eigen_scratch_bytes(ctx, n), qr_scratch_bytes(ctx, n, n, blocks)});
  }
  return blocks * (3 * block.size() + factor + values) * dtype_bytes(dtype) +
         std::max({host, whole_scratch_bytes(), bound_scratch_bytes(blocks, block.size())});
}

int64_t Soap::scratch_bytes(const Context& ctx, const Group& group) const {
  return batch_bytes(ctx, group.shape, at_once_of(ctx, group), group.dtype);
}

Measured Soap::direction(Context& ctx, Group& group, const RuleStep& step) const {
  return some_at_a_time(group.blocks, at_once_of(ctx, group),
                        [&](Blocks blocks) { return some_blocks(ctx, blocks, step); });
}

Measured Soap::some_blocks(Context& ctx, Blocks blocks, const RuleStep& step) const {
  Scratch::Frame frame(ctx.scratch);
  const Tensor& first = blocks[0].grad;
  const Shape rooms{std::ssize(blocks), first.shape[0], first.shape[1]};
  const auto take = [&](const Shape& shape) { return frame.tensor(shape, first.dtype); };
  int64_t factor = 0;
  for (const Side side : kSides)
    if (const int64_t n = side_length(side, rooms[1], rooms[2]); rotates(side, first.shape))
      factor = std::max(factor, n * n);
  const Batch batch{.blocks = blocks,
                    .g = take(rooms),
                    .m = take(rooms),
                    .spare = take(rooms),
                    .factors = take({rooms[0] * factor})};
  if (step.t > 1) adam(ctx, batch, step);
  update_factors(ctx, batch, step);
  const Measured measured = finish(ctx, batch, step);
  for (const Side side : kSides)
    if (rotates(side, first.shape) && (step.t == 1 || (step.t - 1) % freq_ == 0))
      update_bases(ctx, batch, side, step);
  return measured;
}

std::vector<Tensor> Soap::bases(Blocks blocks, Side side) const {
  std::vector<Tensor> list;
  for (const Block& block : blocks) list.push_back(block.state[factor_index(side, block.grad.shape) + 1]);
  return list;
}

void Soap::rotate(Context& ctx, const Batch& batch, const Rotation& args) const {
  const Shape& shape = args.x[0].shape;
  const bool left = rotates(Side::left, shape), right = rotates(Side::right, shape);
  const std::vector<Tensor> between = matrices_of(batch.spare);
  if (left)
    products(ctx, {.c = right ? std::span(between) : args.to,
                   .a = bases(batch.blocks, Side::left),
                   .b = args.x,
                   .transpose_a = !args.back});
  if (right)
    products(ctx, {.c = args.to,
                   .a = left ? std::span(between) : args.x,
                   .b = bases(batch.blocks, Side::right),
                   .transpose_b = args.back});
  if (left || right) return;
  std::vector<Smooth> copies;
  for (size_t i = 0; i < args.x.size(); ++i) copies.push_back({.u = args.to[i], .g = args.x[i]});
  smooth(ctx, copies);
}

/// Moments of all blocks, and their directions in batch.g, in the coordinates of the bases; the gradients
/// stay. Rotating is linear: m' after the step is the mean of the rotated old m and G'.
void Soap::adam(Context& ctx, const Batch& batch, const RuleStep& step) const {
  const std::vector<Tensor> rotated = matrices_of(batch.g), moments = matrices_of(batch.m);
  rotate(ctx, batch, {.to = rotated, .x = grads_of(batch.blocks)});
  if (beta1_ > 0) {
    std::vector<Tensor> old;
    for (const Block& block : batch.blocks) old.push_back(block.state.front());
    rotate(ctx, batch, {.to = moments, .x = old});
  }
  const double steps = static_cast<double>(step.t - 1);
  std::vector<AdamDirection> directions;
  std::vector<Smooth> means;
  for (size_t i = 0; i < batch.blocks.size(); ++i) {
    const Block& block = batch.blocks[i];
    directions.push_back({.u = rotated[i],
                          .m = beta1_ > 0 ? moments[i] : Tensor{},
                          .v = beta2_ > 0 ? block.state[beta1_ > 0 ? 1 : 0] : Tensor{},
                          .g = rotated[i],
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
}

/// Of the gradients, which it bounds in batch.m.
void Soap::update_factors(Context& ctx, const Batch& batch, const RuleStep& step) const {
  const Shape& shape = batch.blocks[0].grad.shape;
  gather_pieces(ctx, batch.m, grads_of(batch.blocks), {.rows = shape[0], .cols = shape[1]});
  bound(ctx, batch.m);
  for (const Side side : kSides) {
    if (!rotates(side, shape)) continue;
    const Tensor grams = room_for(batch.factors, batch.m, side);
    gram(ctx, grams, batch.m, side);
    std::vector<StateValue> list;
    for (size_t i = 0; i < batch.blocks.size(); ++i)
      list.push_back({batch.blocks[i].state[factor_index(side, shape)], grams[static_cast<int64_t>(i)]});
    accumulate(ctx, list, beta_, 1 - beta_, step);
  }
}

/// Eigenvectors are found one matrix after the other, which happens once.
void Soap::update_bases(Context& ctx, const Batch& batch, Side side, const RuleStep& step) const {
  const std::vector<Tensor> old = bases(batch.blocks, side);
  const std::vector<Tensor> fresh = matrices_of(room_for(batch.factors, batch.m, side));
  std::vector<Tensor> factors;
  std::vector<Qr> list;
  std::vector<StateValue> kept;
  for (size_t i = 0; i < fresh.size(); ++i) {
    factors.push_back(batch.blocks[i].state[factor_index(side, batch.blocks[i].grad.shape)]);
    list.push_back({.q = fresh[i], .x = fresh[i]});
    kept.push_back({old[i], fresh[i]});
  }
  if (step.t > 1) {
    products(ctx, {.c = fresh, .a = factors, .b = old});
    qr(ctx, list);
  } else {
    for (size_t i = 0; i < fresh.size(); ++i) {
      Scratch::Frame frame(ctx.scratch);
      const Tensor values = frame.tensor({fresh[i].shape[0]}, fresh[i].dtype);
      symmetric_eigen(ctx, {.values = values, .vectors = fresh[i], .a = factors[i]});
    }
  }
  keep(ctx, kept, step);
}

/// The directions, back in the coordinates of the weights, take the place of the gradients, which are m for a
/// moment if <m, u> is asked for.
Measured Soap::finish(Context& ctx, const Batch& batch, const RuleStep& step) const {
  if (step.t == 1) {
    std::vector<Smooth> nothing;  // 0 G, which is not 0 where G is not finite
    for (const Block& block : batch.blocks) nothing.push_back({.u = block.grad, .g = block.grad, .gain = 0});
    smooth(ctx, nothing);
    return {};
  }
  Measured measured;
  if (step.measure) {
    const double correction = 1 - std::pow(beta1_, static_cast<double>(step.t - 1));
    std::vector<Smooth> means, copies;
    for (const Block& block : batch.blocks) {
      means.push_back(beta1_ > 0 ? Smooth{.u = block.grad, .g = block.state.front(), .gain = 1 / correction}
                                 : Smooth{.u = block.grad, .g = block.grad, .scale = step.grad_scale});
      copies.push_back({.u = batch.m[std::ssize(copies)], .g = block.grad});
    }
    smooth(ctx, means);
    smooth(ctx, copies);
    measured.along = measure_along(ctx, batch.blocks);
  }
  rotate(ctx, batch, {.to = grads_of(batch.blocks), .x = matrices_of(batch.g), .back = true});
  for (int64_t i = 0; step.measure && i < batch.m.shape[0]; ++i)
    measured.dual += dot(ctx, batch.m[i], batch.blocks[static_cast<size_t>(i)].grad);
  return measured;
}
}  // namespace

std::unique_ptr<Rule> make_soap(Keyed& keys) {
  return std::make_unique<Soap>(keys);
}
