// dion: a low-rank polar factor of the momentum, tracked by one step of power iteration; what the rank leaves
// out stays in the momentum (error feedback).
//
//   B = M + g                                        (out, in)
//   P = orthonormal basis of B Q                     (out, rank), by QR
//   R = B^T P                                        (in, rank)
//   M = B - (1 - momentum) P R^T
//   Q = R, its columns brought to length 1           (in, rank), state "q"
//   u = sqrt(out / in) P Q^T                         norm rms-rms, close to its dual vector
//
// Ahn et al., "Dion: Distributed Orthonormalized Updates", arXiv 2504.05295, without its distribution over
// devices. rank defaults to min(out, in) / 4, at least 1, and is min(out, in) at most; at full rank u
// approaches that of muon with ema=0, nesterov=0, scale=rms as Q settles. A q of zeros, at the beginning or
// after a B of zeros, starts anew from a random orthonormal basis, the same every time. Where B has a lower
// rank than P, the rest of P and Q is noise of length 1, as in the paper. Asked for a dual norm it reports
// <B, u>. Waits for a GPU: QR is LAPACK's, on the host, in float64.
#include <algorithm>
#include <cmath>

#include "model/kernels/matmul.h"
#include "model/kernels/reduce.h"
#include "optim/at_once.h"
#include "optim/eigen.h"
#include "optim/rule.h"
#include "optim/update.h"
#include "random.h"

namespace {
/// Scratch of some blocks: P and Q of each, as LAPACK takes several at once, and room for what one after the
/// other makes.
struct Workspace {
  Tensor p;      // (blocks, out, rank)
  Tensor q;      // (blocks, in, rank), the old, then the new
  Tensor r;      // (in, rank)
  Tensor sizes;  // (rank), of R's columns
  Tensor low;    // as stored: P R^T
  Tensor guard;
};

class Dion final : public Rule {
 public:
  explicit Dion(Keyed& keys)
      : Rule(keys, 0.01),
        momentum_(keys.number("momentum", 0.95, 0, 1)),
        rank_(keys.integer("rank", 0, 0, 1 << 20)) {}  // 0: a quarter

  Norm norm() const override { return {NormKind::rms_rms}; }
  std::string describe() const override {
    return "rms-rms, " + (rank_ > 0 ? "rank " + std::to_string(rank_) : std::string("a quarter of its rank"));
  }
  bool matrices_only() const override { return true; }
  bool waits() const override { return true; }
  std::vector<StateSpec> state(const Group& group) const override {
    return {{.name = "m", .shape = group.shape}, {.name = "q", .shape = {group.in(), rank_of(group)}}};
  }
  /// Four products with P, Q or R, and a QR by reflections.
  double work(const Group& group) const override {
    const auto out = static_cast<double>(group.out()), in = static_cast<double>(group.in()),
               rank = static_cast<double>(rank_of(group));
    return 8 * out * in * rank + 4 * out * rank * rank;
  }
  int64_t scratch_bytes(const Context& ctx, const Group& group) const override {
    const int64_t out = group.out(), in = group.in(), rank = rank_of(group), blocks = at_once_of(ctx, group);
    return dtype_bytes(group.dtype) * (out * in + (blocks * (out + in) + in + 1) * rank) +
           guard_scratch_bytes() +
           std::max({qr_scratch_bytes(ctx, out, rank, blocks), qr_scratch_bytes(ctx, in, rank),
                     col_norms_scratch_bytes(in, rank), whole_scratch_bytes()});
  }
  Measured direction(Context& ctx, Group& group, const RuleStep& step) const override {
    const std::span<const Block> all = group.blocks;
    const auto most = static_cast<size_t>(at_once_of(ctx, group));
    Measured measured;
    for (size_t i = 0; i < all.size(); i += most)
      measured += some_blocks(ctx, group, all.subspan(i, std::min(most, all.size() - i)), step);
    return measured;
  }

 private:
  int64_t rank_of(const Group& group) const {
    const int64_t most = std::min(group.out(), group.in());
    return rank_ > 0 ? std::min(rank_, most) : std::max<int64_t>(most / 4, 1);
  }
  /// How many blocks are taken together: what they hold stays in a CPU's caches until the bases are done.
  int64_t at_once_of(const Context& ctx, const Group& group) const {
    const int64_t one =
        dtype_bytes(group.dtype) * (group.shape.size() + (group.out() + group.in()) * rank_of(group));
    return at_once(ctx, one, static_cast<int64_t>(group.blocks.size()), ctx.threads);
  }
  Measured some_blocks(Context& ctx, const Group& group, std::span<const Block> blocks,
                       const RuleStep& step) const;
  Measured finish(Context& ctx, const Group& group, const Block& block, const Workspace& w, int64_t i,
                  const RuleStep& step) const;

  double momentum_;
  int64_t rank_;
};

struct Product {
  Tensor c, a, b;
  bool transpose_a = false, transpose_b = false;
  double alpha = 1;
};
/// c = alpha op(a) op(b) of single matrices.
void multiply(Context& ctx, const Product& x) {
  const auto one = [](const Tensor& m) { return m.view({1, m.shape[0], m.shape[1]}); };
  batched_matmul(ctx, {.c = one(x.c),
                       .a = one(x.a),
                       .b = one(x.b),
                       .transpose_a = x.transpose_a,
                       .transpose_b = x.transpose_b,
                       .alpha = x.alpha});
}

/// left right^T, (out, in), as the group stores it.
void outer(Context& ctx, const Group& group, const Product& x) {
  multiply(ctx, {.c = x.c,
                 .a = group.transposed ? x.b : x.a,
                 .b = group.transposed ? x.a : x.b,
                 .transpose_b = true,
                 .alpha = x.alpha});
}

/// q <- a random orthonormal basis.
void start(Context& ctx, const Tensor& q) {
  OnHost host(ctx, q, /*load=*/false);
  Random random(0, hash_name("dion"));
  for (int64_t i = 0; i < q.size(); ++i) {
    float x = 0, unused = 0;
    random.normal_pair(x, unused);
    if (q.dtype == DType::f64)
      host->f64()[i] = x;
    else
      host->f32()[i] = x;
  }
  host.store();
  qr(ctx, {.q = q, .x = q});
}

Measured Dion::some_blocks(Context& ctx, const Group& group, std::span<const Block> blocks,
                           const RuleStep& step) const {
  const int64_t out = group.out(), in = group.in(), rank = rank_of(group), count = std::ssize(blocks);
  Scratch::Frame frame(ctx.scratch);
  const auto take = [&](const Shape& shape) { return frame.tensor(shape, group.dtype); };
  const Workspace w{.p = take({count, out, rank}),
                    .q = take({count, in, rank}),
                    .r = take({in, rank}),
                    .sizes = take({rank}),
                    .low = take(group.shape),
                    .guard = guard_of(ctx, frame, step)};
  std::vector<Qr> bases;
  for (int64_t i = 0; i < count; ++i) {
    const Block& block = blocks[static_cast<size_t>(i)];
    const Tensor &b = block.grad, p = w.p[i], q = w.q[i];
    smooth(ctx, {.u = b, .m = block.state[0], .g = b, .beta = 1, .gain = 1, .scale = step.grad_scale});
    smooth(ctx, {.u = q, .g = block.state[1]});
    if (max_abs(ctx, q) == 0) start(ctx, q);
    multiply(ctx, {.c = p, .a = b, .b = q, .transpose_a = group.transposed});
    bases.push_back({.q = p, .x = p});
  }
  qr(ctx, bases);
  Measured measured;
  for (int64_t i = 0; i < count; ++i)
    measured += finish(ctx, group, blocks[static_cast<size_t>(i)], w, i, step);
  return measured;
}

/// Block i of w, whose B is in its gradient and whose P is orthonormal.
Measured Dion::finish(Context& ctx, const Group& group, const Block& block, const Workspace& w, int64_t i,
                      const RuleStep& step) const {
  const Tensor &b = block.grad, &m = block.state[0], p = w.p[i], q = w.q[i];
  multiply(ctx, {.c = w.r, .a = b, .b = p, .transpose_a = !group.transposed});
  outer(ctx, group, {.c = w.low, .a = p, .b = w.r});
  smooth(ctx, {.u = w.low, .m = m, .g = w.low, .beta = 1, .gain = momentum_ - 1, .scale = w.guard});
  col_norms(ctx, {.norms = w.sizes, .x = w.r});
  scale_cols(ctx, {.y = q, .x = w.r, .scales = w.sizes, .divide = true});
  smooth(ctx, {.u = block.state[1], .g = q, .scale = w.guard});
  const double scale = norm_scale(norm(), group.out(), group.in());
  Measured measured;
  if (step.measure)  // <B, P Q^T> = <B^T P, Q>
    measured = {.dual = scale * dot(ctx, w.r, q), .along = measure_along(ctx, {&block, 1})};
  outer(ctx, group, {.c = block.grad, .a = p, .b = q, .alpha = scale});
  return measured;
}
}  // namespace

std::unique_ptr<Rule> make_dion(Keyed& keys) {
  return std::make_unique<Dion>(keys);
}
