// The largest p-norm of a column, and of a row with the conjugate exponent (Proposition 8): l1-lp, l1-rms,
// lp-linf, rms-linf. The dual norm adds up the lines' norms with the conjugate exponent; the dual vector
// takes every line to its own (lines.h). p = 2 has operations of its own.
#include <cmath>
#include <limits>

#include "model/kernels/reduce.h"
#include "model/kernels/simd.h"
#include "optim/lines.h"
#include "optim/norm_family.h"
#include "optim/unit_lines.h"

namespace {
/// q with 1/p + 1/q = 1.
double conjugate(double p) {
  if (p == 1) return std::numeric_limits<double>::infinity();
  return std::isinf(p) ? 1 : p / (p - 1);
}

/// The rows of all matrices below each other.
Tensor all_rows(const Tensor& batch) {
  return batch.view({batch.shape[0] * batch.shape[1], batch.shape[2]});
}

int64_t count_of(const Tensor& batch, Lines lines) {
  return batch.shape[0] * (lines == Lines::rows ? batch.shape[1] : batch.shape[2]);
}

/// Euclidean norms of lines, by the fastest way there is.
void euclidean_norms(Context& ctx, const Tensor& norms, const Tensor& x, Lines lines) {
  if (lines == Lines::rows) return row_norms(ctx, {.norms = norms, .x = all_rows(x)});
  const int64_t batch = x.shape[0], cols = x.shape[2];
  for (int64_t i = 0; i < batch; ++i) col_norms(ctx, {.norms = norms.view({batch, cols})[i], .x = x[i]});
}

/// Euclidean dual vectors of lines.
void euclidean_duals(Context& ctx, const Tensor& x, Lines lines, const DualOutput& to) {
  UnitLines rows{.u = to.out,
                 .g = all_rows(x),
                 .lines = lines,
                 .factor = to.scale,
                 .norms = to.lengths,
                 .into = to.into};
  if (to.out) rows.u = all_rows(to.out);
  if (lines == Lines::rows || x.shape[0] == 1) return unit_lines(ctx, rows);
  for (int64_t i = 0; i < x.shape[0]; ++i)  // each matrix has columns of its own
    unit_lines(ctx, {.u = to.out[i], .g = x[i], .lines = lines, .factor = to.scale});
}

class LineFamily final : public NormFamily {
 public:
  explicit LineFamily(bool by_rows) : by_rows_(by_rows) {}

  void values(Context& ctx, const NormInput& in, bool dual, std::span<double> values) const override {
    const Lines lines = in_storage(in);
    const double q = dual ? dual_exponent(in.norm) : conjugate(dual_exponent(in.norm));
    Scratch::Frame frame(ctx.scratch);
    const Tensor norms = frame.tensor({count_of(in.x, lines)}, in.x.dtype);
    if (q == 2)
      euclidean_norms(ctx, norms, in.x, lines);
    else
      line_norms(ctx, {.norms = norms, .x = in.x, .lines = lines, .q = q});
    const OnHost here(ctx, norms);
    for_real_type(norms.dtype,
                  [&]<typename T>(T) { combine(reals_of<T>(*here), norms.size(), /*sum=*/dual, values); });
  }

  void dualize(Context& ctx, const NormInput& in, const DualOutput& to, const PolarMethod&) const override {
    const double q = dual_exponent(in.norm);
    if (q == 2) return euclidean_duals(ctx, in.x, in_storage(in), to);
    line_duals(ctx, {.y = to.out, .x = in.x, .lines = in_storage(in), .q = q, .factor = to.scale});
  }
  bool moves(const Norm& norm) const override { return dual_exponent(norm) == 2; }
  Lengths lengths(const Norm& norm, bool transposed) const override {
    const bool columns = by_rows_ == transposed;
    return moves(norm) && columns ? Lengths::columns : Lengths::none;
  }

  int64_t scratch_bytes(const Context&, const Shape& batch, DType dtype, const PolarMethod&) const override {
    const int64_t count = batch[0], rows = batch[1], cols = batch[2], each = dtype_bytes(dtype);
    return std::max({unit_lines_scratch_bytes(count * rows, cols, Lines::rows, dtype),
                     unit_lines_scratch_bytes(rows, cols, Lines::columns, dtype),
                     each * count * cols + col_norms_scratch_bytes(rows, cols)});
  }

 private:
  /// The exponent of the lines' norms whose sum is the dual norm.
  double dual_exponent(const Norm& norm) const { return by_rows_ ? norm.p : conjugate(norm.p); }
  /// The paper's columns and rows are the storage's rows and columns when it is transposed.
  Lines in_storage(const NormInput& in) const {
    return by_rows_ != in.transposed ? Lines::rows : Lines::columns;
  }

  bool by_rows_;
};
}  // namespace

const NormFamily& norms_of_columns() {
  static const LineFamily family(/*by_rows=*/false);
  return family;
}
const NormFamily& norms_of_rows() {
  static const LineFamily family(/*by_rows=*/true);
  return family;
}
