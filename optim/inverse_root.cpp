#include "optim/inverse_root.h"

#include <algorithm>
#include <cmath>
#include <span>
#include <utility>

#include "model/kernels/matmul.h"
#include "model/kernels/reduce.h"
#include "optim/at_once.h"
#include "optim/eigen.h"
#include "optim/power.h"
#include "optim/update.h"

// Fortran: every argument by address, matrices by columns, the length of character strings last.
extern "C" void dsyrk_(const char* triangle, const char* transpose, const int* n, const int* k,
                       const double* alpha, const double* a, const int* lda, const double* beta, double* c,
                       const int* ldc, size_t triangle_length, size_t transpose_length);

namespace {
constexpr int kMatrices = 4;     // of scratch per matrix of the batch, by newton
constexpr int kMostSteps = 100;  // 2^100 is still a float

double rounding_unit(DType dtype) {
  return dtype == DType::f64 ? 0x1p-52 : 0x1p-23;
}

double default_cutoff(DType dtype) {
  return dtype == DType::f64 ? 1e-12 : 1e-6;
}

/// Laid under the eigenvalues of A / ||A||_F, so that rounding leaves none below zero. 1.3 to 2 times what it
/// took for singular matrices of rank 1 and n / 4 with n = 3 .. 300 and p = 2 .. 8 in f32: 0.5 to 4 units in
/// the last place of 1, growing like sqrt(n), as sums of n rounded products do.
double relative_damping(DType dtype, int64_t n) {
  return rounding_unit(dtype) * (1 + std::sqrt(static_cast<double>(n)) / 4);
}

/// (max(v, floor) + eps)^power, or 0 where v counts as zero; `values` ascend.
double power_of_value(const InverseRoot& args, double v, std::span<const double> values) {
  const double cutoff = args.cutoff > 0 ? args.cutoff : default_cutoff(args.a.dtype);
  if (args.pseudo && !(v > cutoff * values.back())) return 0;
  const double digits = std::pow(8 * rounding_unit(args.a.dtype), -1 / args.power);
  const double floor = std::max(-values.front(), digits * values.back());
  return std::pow(std::max(v, floor) + args.eps, args.power);
}

/// One matrix, in host memory: X = B^T B, where row k of B is eigenvector k times the root of its value's
/// power; a sum of squares of which BLAS makes one triangle, so that X is exactly symmetric. Our rows are the
/// columns of BLAS.
void by_eigen(HostRoom& room, const InverseRoot& args, const Tensor& x, const Tensor& a) {
  const int64_t N = a.shape[0];
  const int n = static_cast<int>(N);
  double* out = room.doubles(N * N);
  const HostEigen eigen = host_eigen(room, a);
  if (!eigen.finite) return store_nan(x);
  const std::span<const double> values(eigen.values, static_cast<size_t>(n));
  for (int64_t k = 0; k < N; ++k) {
    const double root = std::sqrt(power_of_value(args, eigen.values[k], values));
    for (int64_t j = 0; j < N; ++j) eigen.vectors[k * N + j] *= root;
  }
  const double one = 1, zero = 0;
  dsyrk_("L", "N", &n, &n, &one, eigen.vectors, &n, &zero, out, &n, 1, 1);
  store_doubles(x, [&](int64_t i) { return out[std::min(i / N, i % N) * N + std::max(i / N, i % N)]; });
}

int64_t by_eigen_doubles(int64_t n) {
  return n * n + host_eigen_doubles(n);
}

/// A part of a batch under coupled Newton. X is kept without the factor z^(1/p), so that it starts as I.
class Newton {
 public:
  Newton(Context& ctx, const InverseRoot& args, int64_t first, int64_t count)
      : ctx_(ctx), args_(args), p_(newton_order(args.power)), frame_(ctx.scratch) {
    a_ = args.a.slice(first, count);
    out_ = args.x.slice(first, count);
    norms_ = frame_.tensor({count}, a_.dtype);
    for (Tensor* t : {&x_, &m_, &t_, &spare_}) *t = frame_.tensor(a_.shape, a_.dtype);
  }

  int run() {
    start();
    int step = 0;
    while (step < args_.steps && !(args_.tolerance > 0 && error() < args_.tolerance)) {
      affine(t_, -1.0 / p_, (p_ + 1.0) / p_);  // T
      if (step == 0)
        smooth(ctx_, {.u = x_, .g = t_});  // I T
      else
        multiply(x_, x_, t_);
      ++step;
      if (step < args_.steps || args_.tolerance > 0) times_power();
    }
    finish(step);
    return step;
  }

 private:
  Tensor flat(const Tensor& t) const { return t.view({t.shape[0], t.shape[1] * t.shape[2]}); }

  /// y = factor M + value I
  void affine(const Tensor& y, double factor, double value) {
    smooth(ctx_, {.u = y, .g = m_, .gain = factor});
    add_diagonal(ctx_, {.x = y, .value = value});
  }

  /// c = a b, where c may name the memory of a or b: the product goes to the spare matrix, which then is c.
  void multiply(Tensor& c, const Tensor& a, const Tensor& b) {
    batched_matmul(ctx_, {.c = spare_, .a = a, .b = b, .symmetric = true, .drop_denormals = true});
    std::swap(c, spare_);
  }

  /// M = z A, a little away from singular.
  void start() {
    smooth(ctx_, {.u = t_, .g = a_});
    if (args_.eps != 0) add_diagonal(ctx_, {.x = t_, .value = args_.eps});
    row_norms(ctx_, {.norms = norms_, .x = flat(t_)});
    const double half = (1 + p_) / 2.0;
    scale_rows(ctx_, {.y = flat(m_), .x = flat(t_), .scales = norms_, .factor = half, .divide = true});
    add_diagonal(ctx_, {.x = m_, .value = half * relative_damping(a_.dtype, a_.shape[1])});
  }

  /// M <- T^p M by the bits of p; T is used up.
  void times_power() {
    for (int bits = p_; bits != 0; bits /= 2) {
      if (bits % 2 == 1) multiply(m_, t_, m_);
      if (bits > 1) multiply(t_, t_, t_);
    }
  }

  /// max |M - I|; waits.
  double error() {
    affine(spare_, 1, -1);
    return max_abs(ctx_, spare_);
  }

  /// x = z^(1/p) X; a zero norm gives zero. Without a step X is I.
  void finish(int steps) {
    if (steps == 0) affine(x_, 0, 1);
    power(ctx_, {.y = norms_, .x = norms_, .exponent = args_.power});
    scale_rows(
        ctx_,
        {.y = flat(out_), .x = flat(x_), .scales = norms_, .factor = std::pow((1 + p_) / 2.0, 1.0 / p_)});
  }

  Context& ctx_;
  const InverseRoot& args_;
  int p_;
  Scratch::Frame frame_;
  Tensor a_, out_, norms_, x_, m_, t_, spare_;
};
}  // namespace

int newton_order(double power) {
  const double p = power < 0 ? std::round(-1 / power) : 0;
  return p >= 1 && p <= 8 && std::fabs(power * p + 1) < 1e-9 ? static_cast<int>(p) : 0;
}

int inverse_root(Context& ctx, const InverseRoot& args) {
  const Shape& shape = args.a.shape;
  expect(shape.rank() == 3 && shape[1] == shape[2], "inverse_root: a must be (batch, n, n)");
  expect_shape(args.x, shape, "inverse_root: x");
  expect(args.x.dtype == args.a.dtype, "inverse_root: x needs the dtype of a");
  expect(args.power < 0, "inverse_root: power must be negative");
  const int64_t batch = shape[0];
  if (args.method == RootMethod::eigen) {
    const int64_t n = shape[2];
    const double flops = eigen_flops(n) + std::pow(n, 3);
    const OpTimer timer(ctx, "inverse_root_eigen", Work{.flops = static_cast<double>(batch) * flops});
    OnHost a(ctx, args.a), x(ctx, args.x, /*load=*/false);
    side_by_side(ctx, batch, by_eigen_doubles(n),
                 [&](int64_t i, HostRoom& room) { by_eigen(room, args, (*x)[i], (*a)[i]); });
    x.store();
    return 0;
  }
  expect(newton_order(args.power) != 0, "inverse_root: newton needs power = -1/p, p = 1 .. 8");
  expect(!args.pseudo, "inverse_root: only eigen has pseudo-inverses");
  expect(args.steps > 0 && args.steps <= kMostSteps, "inverse_root: steps must be 1 .. 100");
  int most = 0;
  const int64_t count = at_once(ctx, kMatrices * args.a[0].bytes(), batch);
  for (int64_t i = 0; i < batch; i += count)
    most = std::max(most, Newton(ctx, args, i, std::min(count, batch - i)).run());
  return most;
}

int64_t inverse_root_scratch_bytes(const Context& ctx, const Shape& shape, DType dtype, RootMethod method) {
  const int64_t n = shape[2], bytes = dtype_bytes(dtype) * n * n;
  if (method == RootMethod::eigen) return side_by_side_bytes(ctx, shape[0], by_eigen_doubles(n));
  const int64_t count = at_once(ctx, kMatrices * bytes, shape[0]);
  return count * (kMatrices * bytes + dtype_bytes(dtype)) +
         std::max(row_norms_scratch_bytes(count, n * n), whole_scratch_bytes());
}
