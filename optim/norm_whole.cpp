// The Euclidean norm of all entries, its own dual: frobenius, and rms for vectors.
#include <cmath>
#include <vector>

#include "model/kernels/reduce.h"
#include "optim/norm_family.h"
#include "optim/unit_lines.h"

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

  void dualize(Context& ctx, const NormInput& in, const DualOutput& to, const PolarMethod&) const override {
    unit_lines(ctx, {.u = to.out ? flat(to.out) : Tensor{},
                     .g = flat(in.x),
                     .lines = Lines::rows,
                     .factor = to.scale,
                     .norms = to.lengths,
                     .into = to.into});
  }
  bool moves(const Norm&) const override { return true; }
  Lengths lengths(const Norm&, bool) const override { return Lengths::whole; }

  int64_t scratch_bytes(const Context&, const Shape& batch, DType dtype, const PolarMethod&) const override {
    const int64_t count = batch[0], rows = batch[1], cols = batch[2];
    const std::vector<Tensor> matrices(static_cast<size_t>(count), Tensor{nullptr, dtype, {rows, cols}});
    return std::max(unit_lines_scratch_bytes(count, rows * cols, Lines::rows, dtype),
                    8 * count + sums_of_squares_scratch_bytes(matrices));
  }
};
}  // namespace

const NormFamily& whole_norms() {
  static const WholeNorms family;
  return family;
}
