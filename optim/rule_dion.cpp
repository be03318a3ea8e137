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

#include "model/kernels/reduce.h"
#include "optim/at_once.h"
#include "optim/eigen.h"
#include "optim/products.h"
#include "optim/rule.h"
#include "optim/unit_lines.h"
#include "optim/update.h"
#include "random.h"

namespace {
/// Matrices of some blocks. B is in the place of M.
struct Workspace {
  std::vector<Tensor> b;     // as stored
  std::vector<Tensor> p;     // (out, rank)
  std::vector<Tensor> q, r;  // (in, rank)
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
    return dtype_bytes(group.dtype) * blocks * ((out + 2 * in) * rank + 1) + guard_scratch_bytes() +
           std::max({qr_scratch_bytes(ctx, out, rank, blocks), qr_scratch_bytes(ctx, in, rank),
                     row_norms_scratch_bytes(blocks, in * rank),
                     unit_lines_scratch_bytes(in, rank, Lines::columns, group.dtype), whole_scratch_bytes()});
  }
  Measured direction(Context& ctx, Group& group, const RuleStep& step) const override {
    return some_at_a_time(group.blocks, at_once_of(ctx, group), [&](std::span<const Block> blocks) {
      return some_blocks(ctx, group, blocks, step);
    });
  }

 private:
  int64_t rank_of(const Group& group) const {
    const int64_t most = std::min(group.out(), group.in());
    return rank_ > 0 ? std::min(rank_, most) : std::max<int64_t>(most / 4, 1);
  }
  /// How many blocks are taken together: what they hold stays in a CPU's caches until the bases are done.
  int64_t at_once_of(const Context& ctx, const Group& group) const {
    const int64_t one =
        dtype_bytes(group.dtype) * (2 * group.shape.size() + (group.out() + 2 * group.in()) * rank_of(group));
    return at_once(ctx, one, static_cast<int64_t>(group.blocks.size()), ctx.threads);
  }
  Measured some_blocks(Context& ctx, const Group& group, std::span<const Block> blocks,
                       const RuleStep& step) const;

  double momentum_;
  int64_t rank_;
};

/// c = alpha a b^T + beta c, (out, in), as the group stores it.
void outer(Context& ctx, const Group& group, const Products& x) {
  products(ctx, {.c = x.c,
                 .a = group.transposed ? x.b : x.a,
                 .b = group.transposed ? x.a : x.b,
                 .transpose_b = true,
                 .alpha = x.alpha,
                 .beta = x.beta});
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

/// q (blocks, in, rank) where it holds nothing yet.
void start_new(Context& ctx, const Tensor& q) {
  Scratch::Frame frame(ctx.scratch);
  const int64_t count = q.shape[0];
  const Tensor norms = frame.tensor({count}, q.dtype);
  row_norms(ctx, {.norms = norms, .x = q.view({count, q.shape[1] * q.shape[2]})});
  std::vector<double> values(static_cast<size_t>(count));
  load_doubles(values.data(), *OnHost(ctx, norms));
  for (int64_t i = 0; i < count; ++i)
    if (values[static_cast<size_t>(i)] == 0) start(ctx, q[i]);
}

/// The bases: P of B Q, with the Q of the step before.
void find_bases(Context& ctx, const Group& group, const Workspace& w) {
  products(ctx, {.c = w.p, .a = w.b, .b = w.q, .transpose_a = group.transposed});
  std::vector<Qr> bases;
  for (const Tensor& p : w.p) bases.push_back({.q = p, .x = p});
  qr(ctx, bases);
}

/// M = B - (1 - momentum) P R^T, or B as it is, which then is the old M, when the guard is NaN: of zeros in
/// the place of R. Uses Q as room.
void forget(Context& ctx, const Group& group, const Workspace& w, double part, const Tensor& guard) {
  std::vector<Smooth> zero, copy;
  for (size_t i = 0; i < w.q.size(); ++i) {
    zero.push_back({.u = w.q[i], .g = w.q[i], .gain = 0});
    copy.push_back({.u = w.q[i], .g = w.r[i], .scale = guard});
  }
  if (guard) smooth(ctx, zero), smooth(ctx, copy);
  outer(ctx, group, {.c = w.b, .a = w.p, .b = guard ? w.q : w.r, .alpha = -part, .beta = 1});
}

Measured Dion::some_blocks(Context& ctx, const Group& group, std::span<const Block> blocks,
                           const RuleStep& step) const {
  const int64_t out = group.out(), in = group.in(), rank = rank_of(group), count = std::ssize(blocks);
  Scratch::Frame frame(ctx.scratch);
  const Tensor p = frame.tensor({count, out, rank}, group.dtype);
  const Tensor q = frame.tensor({count, in, rank}, group.dtype);
  const Tensor r = frame.tensor({count, in, rank}, group.dtype);
  const Tensor guard = guard_of(ctx, frame, step);
  Workspace w{.b = {}, .p = matrices_of(p), .q = matrices_of(q), .r = matrices_of(r)};
  std::vector<Smooth> add, load, save;
  for (size_t i = 0; i < blocks.size(); ++i) {
    const Tensor &g = blocks[i].grad, &m = blocks[i].state[0], &old = blocks[i].state[1];
    add.push_back({.u = step.measure ? g : Tensor{}, .m = m, .g = g, .beta = 1, .scale = step.grad_scale});
    load.push_back({.u = w.q[i], .g = old});
    save.push_back({.u = old, .g = w.q[i], .scale = guard});
    w.b.push_back(m);
  }
  smooth(ctx, add);
  Measured measured;
  if (step.measure) measured.along = measure_along(ctx, blocks);
  smooth(ctx, load);
  start_new(ctx, q);
  find_bases(ctx, group, w);
  products(ctx, {.c = w.r, .a = w.b, .b = w.p, .transpose_a = !group.transposed});
  forget(ctx, group, w, 1 - momentum_, guard);
  for (size_t i = 0; i < blocks.size(); ++i)
    unit_lines(ctx, {.u = w.q[i], .g = w.r[i], .lines = Lines::columns});
  smooth(ctx, save);
  const double scale = norm_scale(norm(), out, in);
  if (step.measure) measured.dual = scale * dot(ctx, r, q);  // <B, P Q^T> = <B^T P, Q>
  outer(ctx, group, {.c = grads_of(blocks), .a = w.p, .b = w.q, .alpha = scale});
  return measured;
}
}  // namespace

std::unique_ptr<Rule> make_dion(Keyed& keys) {
  return std::make_unique<Dion>(keys);
}
