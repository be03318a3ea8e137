#include "optim/polar.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "model/kernels/matmul.h"
#include "model/kernels/reduce.h"
#include "optim/at_once.h"
#include "optim/eigen.h"
#include "optim/inverse_root.h"
#include "optim/lines.h"
#include "optim/power.h"
#include "optim/svd.h"
#include "optim/update.h"
#include "random.h"

namespace {
using Kind = PolarMethod::Kind;

/// How a batch will be computed.
struct Plan {
  const PolarMethod& method;
  bool normalize;
  DType dtype;
  bool tall;        // rows > cols: multiply from the right
  int64_t n, m;     // the smaller and the larger side
  bool gram;        // iterate on the Gram matrix
  int64_t at_once;  // matrices iterated together

  int steps() const { return static_cast<int>(method.steps.size()); }
  const Quintic& step(int k) const { return method.steps[static_cast<size_t>(k)]; }
  /// Of norms, scales and the Gram matrix that scales come from.
  DType wide() const { return dtype == DType::bf16 ? DType::f32 : dtype; }
  /// Bytes of scratch that one matrix needs.
  int64_t bytes() const {
    const int64_t squares = method.kind == Kind::newton ? 1 : gram ? 4 : 2;
    const int64_t start = (1 + (method.aol ? n + n * n : 0)) * dtype_bytes(wide());
    return dtype_bytes(dtype) * (squares * n * n + n * m) + start;
  }
};

/// The steps cut into runs, as the end of each, such that the slopes at 0 of all steps of a run but its last
/// multiply to at most `gain`.
std::vector<int> cut(const PolarMethod& method, double gain) {
  std::vector<int> ends;
  double slope = 1;
  for (size_t k = 0; k + 1 < method.steps.size(); ++k)
    if ((slope *= method.steps[k].a) > gain) {
      ends.push_back(static_cast<int>(k) + 1);
      slope = 1;
    }
  ends.push_back(static_cast<int>(method.steps.size()));
  return ends;
}

/// The ends of the runs of steps that begin with a fresh X and R = X X^T each. Rounding leaves an error near
/// 1e-7 in R (1e-16 in f64), which every step of a run but the last multiplies by up to the square of its
/// slope at 0. Up to a gain of 150, about 1e-3 of that reaches the result, and only in directions whose
/// singular value was nearly 0. In f64 a gain of 1000 leaves 1e-10. As few runs as that takes, of the
/// smallest gain that so many can have.
std::vector<int> gram_runs(const PolarMethod& method, DType dtype) {
  double gain = dtype == DType::f64 ? 1000 : 150;
  std::vector<int> best = cut(method, gain);
  for (; gain > 1; gain *= 0.9) {
    std::vector<int> next = cut(method, gain);
    if (next.size() > best.size()) break;
    best = std::move(next);
  }
  return best;
}

/// T steps on one Gram matrix cost 3 m n^2 + (4 T - 3) n^3 multiply-adds (symmetric products at half price),
/// T steps on X itself (3 m n^2 + n^3) T: less from m > n on, clearly less from here on. (At full price, as
/// on a GPU, 2 m n^2 + (4 T - 3) n^3 for one run against (2 m n^2 + n^3) T: the same from here on.)
bool prefer_gram(const PolarMethod& method, DType dtype, int64_t n, int64_t m) {
  return dtype != DType::bf16 && 2 * m >= 3 * n && method.steps.size() >= 2 * gram_runs(method, dtype).size();
}

Plan make_plan(const Context& ctx, const Shape& shape, DType dtype, const PolarMethod& method,
               bool normalize) {
  Plan plan{.method = method,
            .normalize = normalize,
            .dtype = dtype,
            .tall = shape[1] > shape[2],
            .n = std::min(shape[1], shape[2]),
            .m = std::max(shape[1], shape[2]),
            .gram = false,
            .at_once = 1};
  plan.gram = prefer_gram(method, dtype, plan.n, plan.m);
  if (!method.on_host()) plan.at_once = at_once(ctx, plan.bytes(), shape[0]);
  return plan;
}

/// y = a x + small x, or a x + x small for tall x: one product applies the polynomial.
void apply_small(Context& ctx, const Plan& plan, const Tensor& y, const Tensor& small, const Tensor& x,
                 double scale, double a) {
  batched_matmul(ctx, {.c = y,
                       .a = plan.tall ? x : small,
                       .b = plan.tall ? small : x,
                       .addend = x,
                       .alpha = scale,
                       .beta = a});
}

/// gram = x x^T, or x^T x for tall x.
void gram_of(Context& ctx, const Plan& plan, const Tensor& gram, const Tensor& x) {
  batched_matmul(
      ctx,
      {.c = gram, .a = x, .b = x, .transpose_a = plan.tall, .transpose_b = !plan.tall, .symmetric = true});
}

/// small = b r + c r^2
void polynomial(Context& ctx, const Quintic& step, const Tensor& small, const Tensor& r) {
  batched_matmul(
      ctx, {.c = small, .a = r, .b = r, .addend = r, .alpha = step.c, .beta = step.b, .symmetric = true});
}

/// x <- diag(s) x / safety with s_i = 1 / sqrt(sum_j |(x x^T)_ij|) for every matrix; x diag(s) for tall x.
void scale_almost_orthogonal(Context& ctx, const Plan& plan, const Tensor& x) {
  Scratch::Frame frame(ctx.scratch);
  const int64_t batch = x.shape[0], n = plan.n;
  const double factor = 1 / plan.method.safety;
  const Tensor gram = frame.tensor({batch, n, n}, plan.wide()),
               scales = frame.tensor({batch, n}, plan.wide());
  gram_of(ctx, plan, gram, x);
  line_norms(ctx, {.norms = scales, .x = gram, .lines = Lines::rows, .q = 1});
  power(ctx, {.y = scales, .x = scales, .exponent = -0.5});
  if (!plan.tall) {
    const Tensor rows = x.view({batch * n, plan.m});
    return scale_rows(ctx, {.y = rows, .x = rows, .scales = scales.view({batch * n}), .factor = factor});
  }
  for (int64_t i = 0; i < batch; ++i)
    scale_cols(ctx, {.y = x[i], .x = x[i], .scales = scales[i], .factor = factor});
}

/// y = what the method starts from: x / (safety ||x||_F + eps), perhaps scaled by AOL, for every matrix.
void start(Context& ctx, const Plan& plan, const Tensor& y, const Tensor& x) {
  if (!plan.normalize) return smooth(ctx, {.u = y, .g = x});
  Scratch::Frame frame(ctx.scratch);
  const int64_t batch = x.shape[0];
  const Shape flat{batch, x.shape[1] * x.shape[2]};
  const Tensor norms = frame.tensor({batch}, plan.wide());
  const double safety = plan.method.safety;
  row_norms(ctx, {.norms = norms, .x = x.view(flat)});
  if (plan.method.eps != 0)
    add_diagonal(ctx, {.x = norms.view({batch, 1, 1}), .value = plan.method.eps / safety});
  scale_rows(ctx,
             {.y = y.view(flat), .x = x.view(flat), .scales = norms, .factor = 1 / safety, .divide = true});
  if (plan.method.aol) scale_almost_orthogonal(ctx, plan, y);
}

/// The iteration on X itself, from x back to x through a second buffer.
void plain(Context& ctx, const Plan& plan, const Tensor& x) {
  Scratch::Frame frame(ctx.scratch);
  const int64_t batch = x.shape[0];
  const Tensor a = frame.tensor({batch, plan.n, plan.n}, plan.dtype);
  const Tensor b = frame.tensor({batch, plan.n, plan.n}, plan.dtype);
  Tensor from = frame.tensor(x.shape, plan.dtype), to = x;
  if (plan.steps() % 2 == 0) std::swap(from, to);  // so that the last step lands in x
  start(ctx, plan, from, x);
  for (int k = 0; k < plan.steps(); ++k) {
    const Quintic& step = plan.step(k);
    gram_of(ctx, plan, a, from);
    if (step.c == 0) {
      apply_small(ctx, plan, to, a, from, step.b, step.a);
    } else {
      polynomial(ctx, step, b, a);
      apply_small(ctx, plan, to, b, from, 1, step.a);
    }
    std::swap(from, to);
  }
}

/// q = the product of the polynomials a I + b R + c R^2 of steps [first, last), where r = R at the first and
/// is used up. R and all polynomials of it commute and are symmetric. q, z and t are workspace; returns the
/// one that holds q.
Tensor gram_polynomial(Context& ctx, const Plan& plan, int first, int last, const Tensor& r, Tensor z,
                       Tensor q, Tensor t) {
  for (int k = first; k < last; ++k) {
    const Quintic& step = plan.step(k);
    polynomial(ctx, step, z, r);
    add_diagonal(ctx, {.x = z, .value = step.a});
    if (k + 1 < last) {  // R of the next X: Z R Z
      batched_matmul(ctx, {.c = t, .a = r, .b = z, .symmetric = true, .drop_denormals = true});
      batched_matmul(ctx, {.c = r, .a = t, .b = z, .symmetric = true, .drop_denormals = true});
    }
    if (k == first) {
      std::swap(q, z);
    } else {
      batched_matmul(ctx, {.c = t, .a = z, .b = q, .symmetric = true, .drop_denormals = true});
      std::swap(q, t);
    }
  }
  return q;
}

/// The iteration on R = X X^T, in as few runs as rounding allows; from x back to x through a second buffer.
void on_gram(Context& ctx, const Plan& plan, const Tensor& x) {
  Scratch::Frame frame(ctx.scratch);
  const Shape small{x.shape[0], plan.n, plan.n};
  const Tensor r = frame.tensor(small, plan.dtype), z = frame.tensor(small, plan.dtype),
               q = frame.tensor(small, plan.dtype), t = frame.tensor(small, plan.dtype);
  Tensor from = frame.tensor(x.shape, plan.dtype), to = x;
  const std::vector<int> runs = gram_runs(plan.method, plan.dtype);
  if (runs.size() % 2 == 0) std::swap(from, to);  // so that the last run lands in x
  start(ctx, plan, from, x);
  int first = 0;
  for (const int last : runs) {
    gram_of(ctx, plan, r, from);
    apply_small(ctx, plan, to, gram_polynomial(ctx, plan, first, last, r, z, q, t), from, 1, 0);
    std::swap(from, to);
    first = last;
  }
}

/// Under the eigenvalues of a Gram matrix whose trace is 1. Its zero directions hold rounding of X, near 1e-7
/// in f32, which the root multiplies by up to 1 / sqrt(damping).
constexpr double kNewtonDamping32 = 2e-6, kNewtonDamping64 = 4e-15;

/// X (X^T X)^(-1/2), on the smaller side.
void by_newton(Context& ctx, const Plan& plan, const Tensor& x) {
  Scratch::Frame frame(ctx.scratch);
  const Tensor root = frame.tensor({x.shape[0], plan.n, plan.n}, plan.dtype),
               from = frame.tensor(x.shape, plan.dtype);
  start(ctx, plan, from, x);
  gram_of(ctx, plan, root, from);
  inverse_root(ctx, {.x = root,
                     .a = root,
                     .power = -0.5,
                     .method = RootMethod::newton,
                     .eps = plan.dtype == DType::f64 ? kNewtonDamping64 : kNewtonDamping32,
                     .steps = plan.method.newton_steps});
  apply_small(ctx, plan, x, root, from, 1, 0);
}

/// Sizes of the randomised SVD of one matrix.
struct Sketch {
  static constexpr int64_t kOversampling = 8;
  static constexpr int kPasses = 2;
  int64_t rank, columns;  // columns of Omega

  Sketch(const PolarMethod& method, int64_t rows, int64_t cols) {
    const int64_t all = std::min(rows, cols);
    rank = method.rank > 0 ? std::min(method.rank, all) : all;
    columns = std::min(rank + kOversampling, all);
  }
};

/// N(0, 1) numbers, the same for every matrix and every call.
void fill_gaussian(Context& ctx, const Tensor& omega) {
  OnHost here(ctx, omega, /*load=*/false);
  Random random(/*seed=*/0, hash_name("polar sketch"));
  float a = 0, b = 0;
  store_doubles(*here, [&](int64_t i) {
    if (i % 2 == 0) random.normal_pair(a, b);
    return static_cast<double>(i % 2 == 0 ? a : b);
  });
  here.store();
}

/// One matrix (rows, cols).
void by_sketch(Context& ctx, const Plan& plan, const Tensor& x) {
  Scratch::Frame frame(ctx.scratch);
  const int64_t rows = x.shape[1], cols = x.shape[2];
  const Sketch sketch(plan.method, rows, cols);
  const Tensor g = frame.tensor(x.shape, plan.dtype), y = frame.tensor({1, rows, sketch.columns}, plan.dtype),
               z = frame.tensor({1, cols, sketch.columns}, plan.dtype),
               small = frame.tensor({1, sketch.columns, cols}, plan.dtype);
  start(ctx, plan, g, x);
  fill_gaussian(ctx, z);
  for (int pass = 0; pass <= Sketch::kPasses; ++pass) {
    if (pass > 0) {
      batched_matmul(ctx, {.c = z, .a = g, .b = y, .transpose_a = true});
      qr(ctx, {.q = z[0], .x = z[0]});
    }
    batched_matmul(ctx, {.c = y, .a = g, .b = z});
    qr(ctx, {.q = y[0], .x = y[0]});
  }
  batched_matmul(ctx, {.c = small, .a = y, .b = g, .transpose_a = true});
  // The products leave rounding where the matrix has zero directions.
  svd_polar(ctx, small[0], {.rank = sketch.rank, .cutoff = plan.dtype == DType::f64 ? 1e-14 : 1e-6});
  batched_matmul(ctx, {.c = x, .a = y, .b = small});
}

void one_part(Context& ctx, const Plan& plan, const Tensor& x) {
  switch (plan.method.kind) {
    case Kind::svd:
      svd_polar(ctx, x[0]);
      return;
    case Kind::sketch:
      return by_sketch(ctx, plan, x);
    case Kind::newton:
      return by_newton(ctx, plan, x);
    case Kind::newton_schulz:
      return plan.gram ? on_gram(ctx, plan, x) : plain(ctx, plan, x);
  }
}
}  // namespace

void polar(Context& ctx, const Polar& args) {
  expect(args.x.shape.rank() == 3, "polar: x must be (batch, rows, cols)");
  expect(args.x.dtype != DType::bf16 || args.method.bears_bf16(), "polar: this method needs f32 or f64");
  expect(args.normalize || args.method.kind == Kind::newton_schulz,
         "polar: only Newton-Schulz starts from x as it is");
  const int64_t batch = args.x.shape[0];
  const Plan plan = make_plan(ctx, args.x.shape, args.x.dtype, args.method, args.normalize);
  for (int64_t i = 0; i < batch; i += plan.at_once)
    one_part(ctx, plan, args.x.slice(i, std::min(plan.at_once, batch - i)));
}

int64_t polar_scratch_bytes(const Context& ctx, const Shape& shape, DType dtype, const PolarMethod& method) {
  const int64_t rows = shape[1], cols = shape[2];
  if (method.kind == Kind::svd) return svd_scratch_bytes(ctx, rows, cols);
  const Plan plan = make_plan(ctx, shape, dtype, method, /*normalize=*/true);
  const int64_t norms = row_norms_scratch_bytes(plan.at_once, plan.n * plan.m);
  const int64_t own = plan.at_once * plan.bytes();
  if (method.kind == Kind::newton)
    return own + std::max(norms, inverse_root_scratch_bytes(ctx, {plan.at_once, plan.n, plan.n}, dtype,
                                                            RootMethod::newton));
  if (method.kind == Kind::sketch) {
    const int64_t columns = Sketch(method, rows, cols).columns;
    return own + dtype_bytes(dtype) * (rows + 2 * cols) * columns +
           std::max({norms, qr_scratch_bytes(ctx, std::max(rows, cols), columns),
                     svd_scratch_bytes(ctx, columns, cols)});
  }
  return own + norms;
}
