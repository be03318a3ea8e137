#include "optim/polar.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "error.h"
#include "keyed.h"
#include "model/kernels/matmul.h"
#include "model/kernels/reduce.h"
#include "optim/at_once.h"
#include "optim/svd.h"
#include "optim/update.h"

namespace {
constexpr Quintic kKeller[] = {{3.4445, -4.7750, 2.0315}};
constexpr Quintic kCubic[] = {{1.5, -0.5, 0}};
constexpr Quintic kConvergent[] = {{2, -1.5, 0.5}};
constexpr Quintic kHybrid[] = {
    {3.4445, -4.7750, 2.0315}, {3.4445, -4.7750, 2.0315}, {3.4445, -4.7750, 2.0315},
    {3.4445, -4.7750, 2.0315}, {3.4445, -4.7750, 2.0315}, {3.4445, -4.7750, 2.0315},
    {3.4445, -4.7750, 2.0315}, {3.4445, -4.7750, 2.0315}, {2, -1.5, 0.5}};
constexpr Quintic kPolarExpress[] = {{8.156554524902461, -22.48329292557795, 15.878769915207462},
                                     {4.042929935166739, -2.808917465908714, 0.5000178451051316},
                                     {3.8916678022926607, -2.772484153217685, 0.5060648178503393},
                                     {3.285753657755655, -2.3681294933425376, 0.46449024233003106},
                                     {2.3465413258596377, -1.7097828382687081, 0.42323551169305323}};
constexpr Quintic thousandths(double a, double b, double c) {
  return {a / 1024, b / 1024, c / 1024};
}
constexpr Quintic kModula[] = {thousandths(3955, -8306, 5008), thousandths(3735, -6681, 3463),
                               thousandths(3799, -6499, 3211), thousandths(4019, -6385, 2906),
                               thousandths(2677, -3029, 1162), thousandths(2172, -1833, 682)};

constexpr PolarRow kRows[] = {
    {"svd", {}, 0},         {"keller5", kKeller, 5},        {"polar-express", kPolarExpress, 5, 1.02},
    {"cubic", kCubic, 20},  {"quintic12", kConvergent, 12}, {"hybrid", kHybrid, 10},
    {"modula6", kModula, 6}};
}  // namespace

std::span<const PolarRow> polar_rows() {
  return kRows;
}

std::span<const char* const> polar_names() {
  static constexpr auto kNames = [] {
    std::array<const char*, std::size(kRows)> names{};
    for (size_t i = 0; i < names.size(); ++i) names[i] = kRows[i].name;
    return names;
  }();
  return kNames;
}

PolarMethod polar_method(const std::string& text, int steps, const std::string& option) {
  for (const PolarRow& row : kRows) {
    if (text != row.name) continue;
    if (row.steps.empty() && steps != 0)
      throw UsageError(fmt::format("{} takes no steps, {}, leave steps out", text, option));
    PolarMethod method{.name = row.name, .safety = row.safety};
    if (row.steps.empty()) return method;
    method.kind = PolarMethod::Kind::newton_schulz;
    for (int k = 0; k < (steps > 0 ? steps : row.default_steps); ++k)
      method.steps.push_back(row.steps[std::min(static_cast<size_t>(k), row.steps.size() - 1)]);
    return method;
  }
  throw UsageError(
      fmt::format("'{}' is unknown, {}, choose one of: {}", text, option, listed(polar_names())));
}

double PolarMethod::apply(double x) const {
  for (const Quintic& step : steps) x *= step.a + x * x * (step.b + x * x * step.c);
  return x;
}

namespace {
/// How a batch will be computed.
struct Plan {
  const PolarMethod& method;
  DType dtype;
  bool tall;        // rows > cols: multiply from the right
  int64_t n, m;     // the smaller and the larger side
  bool gram;        // iterate on the Gram matrix
  int64_t at_once;  // matrices iterated together

  int steps() const { return static_cast<int>(method.steps.size()); }
  const Quintic& step(int k) const { return method.steps[static_cast<size_t>(k)]; }
  /// Elements of scratch that one matrix needs.
  int64_t elements() const { return (gram ? 4 : 2) * n * n + n * m; }
};

/// Into how many runs the steps are cut, each with a fresh X and R = X X^T. Rounding leaves an error near
/// 1e-7 in R, which every step of a run but the last multiplies by up to the square of its slope at 0. Up to
/// a gain of 150, about 1e-3 of that reaches the result, and only in directions whose singular value was
/// nearly 0.
int gram_runs(const PolarMethod& method) {
  int runs = 1;
  double gain = 1;
  for (size_t k = 0; k + 1 < method.steps.size(); ++k)
    if ((gain *= method.steps[k].a) > 150) {
      ++runs;
      gain = 1;
    }
  return runs;
}

/// T steps on one Gram matrix cost 3 m n^2 + (4 T - 3) n^3 multiply-adds (symmetric products at half price),
/// T steps on X itself (3 m n^2 + n^3) T: less from m > n on, clearly less from here on. (At full price, as
/// on a GPU, 2 m n^2 + (4 T - 3) n^3 for one run against (2 m n^2 + n^3) T: the same from here on.)
bool prefer_gram(const PolarMethod& method, int64_t n, int64_t m) {
  return 2 * m >= 3 * n && static_cast<int>(method.steps.size()) >= 2 * gram_runs(method);
}

Plan make_plan(const Context& ctx, const Shape& shape, DType dtype, const PolarMethod& method) {
  Plan plan{.method = method,
            .dtype = dtype,
            .tall = shape[1] > shape[2],
            .n = std::min(shape[1], shape[2]),
            .m = std::max(shape[1], shape[2]),
            .gram = false,
            .at_once = 1};
  plan.gram = dtype == DType::f32 && prefer_gram(method, plan.n, plan.m);
  plan.at_once = at_once(ctx, dtype_bytes(dtype) * plan.elements(), shape[0]);
  return plan;
}

/// y = a x + small x, or a x + x small for tall x: one product applies the polynomial.
void apply_small(Context& ctx, const Plan& plan, const Tensor& y, const Tensor& small, const Tensor& x,
                 double scale, double a) {
  batched_matmul(ctx, {.c = y,
                       .a = plan.tall ? x : small,
                       .b = plan.tall ? small : x,
                       .addend = x,
                       .alpha = static_cast<float>(scale),
                       .beta = static_cast<float>(a)});
}

/// gram = x x^T, or x^T x for tall x.
void gram_of(Context& ctx, const Plan& plan, const Tensor& gram, const Tensor& x) {
  batched_matmul(
      ctx,
      {.c = gram, .a = x, .b = x, .transpose_a = plan.tall, .transpose_b = !plan.tall, .symmetric = true});
}

/// small = b r + c r^2
void polynomial(Context& ctx, const Quintic& step, const Tensor& small, const Tensor& r) {
  batched_matmul(ctx, {.c = small,
                       .a = r,
                       .b = r,
                       .addend = r,
                       .alpha = static_cast<float>(step.c),
                       .beta = static_cast<float>(step.b),
                       .symmetric = true});
}

/// y = x / (safety ||x||_F) for every matrix.
void normalize(Context& ctx, const Plan& plan, const Tensor& y, const Tensor& x) {
  Scratch::Frame frame(ctx.scratch);
  const Shape flat{x.shape[0], x.shape[1] * x.shape[2]};
  const Tensor norms = frame.tensor({x.shape[0]});
  row_norms(ctx, {.norms = norms, .x = x.view(flat)});
  scale_rows(ctx, {.y = y.view(flat),
                   .x = x.view(flat),
                   .scales = norms,
                   .factor = static_cast<float>(1 / plan.method.safety),
                   .divide = true});
}

/// The iteration on X itself, from x back to x through a second buffer.
void plain(Context& ctx, const Plan& plan, const Tensor& x) {
  Scratch::Frame frame(ctx.scratch);
  const int64_t batch = x.shape[0];
  const Tensor a = frame.tensor({batch, plan.n, plan.n}, plan.dtype);
  const Tensor b = frame.tensor({batch, plan.n, plan.n}, plan.dtype);
  Tensor from = frame.tensor(x.shape, plan.dtype), to = x;
  if (plan.steps() % 2 == 0) std::swap(from, to);  // so that the last step lands in x
  normalize(ctx, plan, from, x);
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
    add_diagonal(ctx, {.x = z, .value = static_cast<float>(step.a)});
    if (k + 1 < last) {  // R of the next X: Z R Z
      batched_matmul(ctx, {.c = t, .a = r, .b = z, .symmetric = true});
      batched_matmul(ctx, {.c = r, .a = t, .b = z, .symmetric = true});
    }
    if (k == first) {
      std::swap(q, z);
    } else {
      batched_matmul(ctx, {.c = t, .a = z, .b = q, .symmetric = true});
      std::swap(q, t);
    }
  }
  return q;
}

/// The iteration on R = X X^T, in as few runs as rounding allows; from x back to x through a second buffer.
void on_gram(Context& ctx, const Plan& plan, const Tensor& x) {
  Scratch::Frame frame(ctx.scratch);
  const Shape small{x.shape[0], plan.n, plan.n};
  const Tensor r = frame.tensor(small), z = frame.tensor(small), q = frame.tensor(small),
               t = frame.tensor(small);
  Tensor from = frame.tensor(x.shape), to = x;
  const int runs = gram_runs(plan.method);
  if (runs % 2 == 0) std::swap(from, to);  // so that the last run lands in x
  normalize(ctx, plan, from, x);
  for (int run = 0; run < runs; ++run) {
    const int first = plan.steps() * run / runs, last = plan.steps() * (run + 1) / runs;
    gram_of(ctx, plan, r, from);
    apply_small(ctx, plan, to, gram_polynomial(ctx, plan, first, last, r, z, q, t), from, 1, 0);
    std::swap(from, to);
  }
}
}  // namespace

void polar(Context& ctx, const Polar& args) {
  expect(args.x.shape.rank() == 3, "polar: x must be (batch, rows, cols)");
  const int64_t batch = args.x.shape[0];
  if (args.method.kind == PolarMethod::Kind::svd) {
    for (int64_t i = 0; i < batch; ++i) svd_polar(ctx, args.x[i]);
    return;
  }
  const Plan plan = make_plan(ctx, args.x.shape, args.x.dtype, args.method);
  for (int64_t i = 0; i < batch; i += plan.at_once) {
    const Tensor x = args.x.slice(i, std::min(plan.at_once, batch - i));
    plan.gram ? on_gram(ctx, plan, x) : plain(ctx, plan, x);
  }
}

int64_t polar_scratch_bytes(const Context& ctx, const Shape& shape, DType dtype, const PolarMethod& method) {
  if (method.kind == PolarMethod::Kind::svd) return svd_scratch_bytes(ctx, shape[1], shape[2]);
  const Plan plan = make_plan(ctx, shape, dtype, method);
  return plan.at_once * (dtype_bytes(dtype) * plan.elements() + 4) +
         row_norms_scratch_bytes(plan.at_once, plan.n * plan.m);
}
