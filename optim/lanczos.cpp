#include "optim/lanczos.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "model/kernels/matmul.h"
#include "model/kernels/reduce.h"
#include "optim/host_memory.h"
#include "optim/svd.h"
#include "optim/update.h"
#include "random.h"

namespace {
/// A basis of orthonormal vectors of one length, in rows. Rows not reached yet are zero, so that every
/// product has the same shape: a GPU looks for its fastest algorithm once.
struct Basis {
  Context& ctx;
  Tensor rows;      // (1, count, length)
  Tensor products;  // (1, count, 1)

  Basis(Context& context, Scratch::Frame& frame, int64_t count, int64_t length) : ctx(context) {
    rows = frame.tensor({1, count, length});
    products = frame.tensor({1, count, 1});
    OnHost zeros(ctx, rows, /*load=*/false);
    std::ranges::fill(zeros->floats(), 0.0f);
    zeros.store();
  }
  /// Vector k as a column (1, length, 1).
  Tensor column(int k) const { return rows[0][k].view({1, rows.shape[2], 1}); }
  /// Makes `x` (1, length, 1) orthogonal to all rows, puts it at row k with norm 1, and returns its norm.
  double append(int k, const Tensor& x) {
    for (int pass = 0; pass < 2; ++pass) {
      batched_matmul(ctx, {.c = products, .a = rows, .b = x});
      batched_matmul(ctx, {.c = x, .a = rows, .b = products, .transpose_a = true, .alpha = -1, .beta = 1});
    }
    const double norm = std::sqrt(sum_of_squares(ctx, x));
    if (norm > 0) smooth(ctx, {.u = column(k), .g = x, .gain = static_cast<float>(1 / norm)});
    return norm;
  }
};

/// The band of the upper bidiagonal matrix with `alpha` on its diagonal and `beta` right of it.
SingularBand bidiagonal_band(const std::vector<double>& alpha, const std::vector<double>& beta) {
  const size_t n = alpha.size();
  std::vector<double> dense(n * n), values(n);
  for (size_t k = 0; k < n; ++k) {
    dense[k * n + k] = alpha[k];
    if (k + 1 < n) dense[k * n + k + 1] = beta[k];
  }
  Context host;
  const OneThread alone;
  const auto side = static_cast<int64_t>(n);
  host.scratch.reserve(svd_scratch_bytes(host, side, side));
  singular_values(host, Tensor(dense.data(), Shape{side, side}), values);
  return {.low = values.back(), .high = values.front()};
}

void draw_start(Context& ctx, const Tensor& x) {
  OnHost host(ctx, x, /*load=*/false);
  Random random(24);
  for (float& value : host->floats()) value = static_cast<float>(random.uniform() - 0.5);
  host.store();
}
}  // namespace

SingularBand lanczos_band(Context& ctx, const Tensor& a, int steps) {
  expect(a.shape.rank() == 2, "lanczos_band: need a matrix");
  constexpr double kExhausted = 1e-6;  // of the largest number so far: what is left of a vector is rounding
  const bool wide = a.rows() < a.cols();
  const int64_t n = std::min(a.rows(), a.cols()), m = std::max(a.rows(), a.cols());
  const int count = static_cast<int>(std::min<int64_t>(steps, n));
  Scratch::Frame frame(ctx.scratch);
  Basis v(ctx, frame, count, n), u(ctx, frame, count, m);
  const Tensor x = frame.tensor({1, n, 1}), y = frame.tensor({1, m, 1});
  const Tensor matrix = a.view({1, a.rows(), a.cols()});
  std::vector<double> alpha, beta;
  double largest = 0;
  draw_start(ctx, x);
  v.append(0, x);
  for (int k = 0; k < count; ++k) {
    batched_matmul(ctx, {.c = y, .a = matrix, .b = v.column(k), .transpose_a = wide});
    alpha.push_back(u.append(k, y));
    largest = std::max(largest, alpha.back());
    if (!std::isfinite(alpha.back())) return {alpha.back(), alpha.back()};
    if (k + 1 == count || !(alpha.back() > kExhausted * largest)) break;
    batched_matmul(ctx, {.c = x, .a = matrix, .b = u.column(k), .transpose_a = !wide});
    const double rest = v.append(k + 1, x);
    if (!(rest > kExhausted * largest)) break;
    largest = std::max(largest, rest);
    beta.push_back(rest);
  }
  return bidiagonal_band(alpha, beta);
}

int64_t lanczos_scratch_bytes(int64_t rows, int64_t cols, int steps) {
  const int64_t count = std::min<int64_t>(steps, std::min(rows, cols));
  return 4 * (count + 1) * (rows + cols) + 8 * count + whole_scratch_bytes();
}
