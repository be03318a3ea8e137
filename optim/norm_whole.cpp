// The Euclidean norm of all entries, its own dual: frobenius, and rms for vectors.
#include <cmath>
#include <vector>

#include "model/kernels/reduce.h"
#include "optim/norm_family.h"

namespace {
/// Every matrix of the batch as one row.
Tensor flat(const Tensor& batch) {
  return batch.view({batch.shape[0], batch.shape[1] * batch.shape[2]});
}

class WholeNorms final : public NormFamily {
 public:
  void values(Context& ctx, const NormInput& in, bool, std::span<double> values) const override {
    std::vector<Tensor> matrices;
    for (int64_t i = 0; i < in.x.shape[0]; ++i) matrices.push_back(in.x[i]);
    Scratch::Frame frame(ctx.scratch);
    const Tensor sums = frame.tensor({in.x.shape[0]}, DType::f64);
    sums_of_squares(ctx, {.sums = sums, .tensors = matrices});
    const OnHost here(ctx, sums);
    for (size_t i = 0; i < values.size(); ++i) values[i] = std::sqrt(here->f64()[i]);
  }

  void dualize(Context& ctx, const NormInput& in, const Tensor& out, double scale,
               const PolarMethod&) const override {
    Scratch::Frame frame(ctx.scratch);
    const Tensor norms = frame.tensor({in.x.shape[0]}, in.x.dtype);
    row_norms(ctx, {.norms = norms, .x = flat(in.x)});
    scale_rows(ctx, {.y = flat(out), .x = flat(in.x), .scales = norms, .factor = scale, .divide = true});
  }

  int64_t scratch_bytes(const Context&, const Shape& batch, DType dtype, const PolarMethod&) const override {
    const int64_t count = batch[0], rows = batch[1], cols = batch[2];
    const std::vector<Tensor> matrices(static_cast<size_t>(count), Tensor{nullptr, dtype, {rows, cols}});
    return std::max(dtype_bytes(dtype) * count + row_norms_scratch_bytes(count, rows * cols),
                    8 * count + sums_of_squares_scratch_bytes(matrices));
  }
};
}  // namespace

const NormFamily& whole_norms() {
  static const WholeNorms family;
  return family;
}
