// The largest p-norm of a column, and of a row with the conjugate exponent (Proposition 8): l1-lp, l1-rms,
// lp-linf, rms-linf. The dual norm adds up the lines' norms with the conjugate exponent; the dual vector
// takes every line to its own (lines.h). p = 2 has operations of its own.
#include <cmath>
#include <limits>

#include "model/kernels/reduce.h"
#include "model/kernels/simd.h"
#include "optim/lines.h"
#include "optim/norm_family.h"

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

/// y = factor x / ||x||_2 for every line.
void unit_lines(Context& ctx, const Tensor& y, const Tensor& x, Lines lines, double factor) {
  Scratch::Frame frame(ctx.scratch);
  const Tensor norms = frame.tensor({count_of(x, lines)}, x.dtype);
  euclidean_norms(ctx, norms, x, lines);
  if (lines == Lines::rows)
    return scale_rows(
        ctx, {.y = all_rows(y), .x = all_rows(x), .scales = norms, .factor = factor, .divide = true});
  const int64_t batch = x.shape[0], cols = x.shape[2];
  for (int64_t i = 0; i < batch; ++i)
    scale_cols(
        ctx,
        {.y = y[i], .x = x[i], .scales = norms.view({batch, cols})[i], .factor = factor, .divide = true});
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

  void dualize(Context& ctx, const NormInput& in, const Tensor& out, double scale,
               const PolarMethod&) const override {
    const double q = dual_exponent(in.norm);
    if (q == 2) return unit_lines(ctx, out, in.x, in_storage(in), scale);
    line_duals(ctx, {.y = out, .x = in.x, .lines = in_storage(in), .q = q, .factor = scale});
  }

  int64_t scratch_bytes(const Context&, const Shape& batch, DType dtype, const PolarMethod&) const override {
    const int64_t count = batch[0], rows = batch[1], cols = batch[2], each = dtype_bytes(dtype);
    return std::max(each * count * rows + row_norms_scratch_bytes(count * rows, cols),
                    each * count * cols + col_norms_scratch_bytes(rows, cols));
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
