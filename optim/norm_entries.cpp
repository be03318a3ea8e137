// The largest entry, whose dual norm is the sum of all |entries| and whose dual vector is the sign: l1-linf,
// the max-of-max norm of Proposition 3, and its multiples.
#include "model/kernels/reduce.h"
#include "optim/norm_family.h"
#include "optim/update.h"

namespace {
class EntryNorms final : public NormFamily {
 public:
  void values(Context& ctx, const NormInput& in, bool dual, std::span<double> values) const override {
    for (size_t i = 0; i < values.size(); ++i) {
      const Tensor matrix = in.x[static_cast<int64_t>(i)];
      values[i] = dual ? sum_abs(ctx, matrix) : max_abs(ctx, matrix);
    }
  }
  void dualize(Context& ctx, const NormInput& in, const DualOutput& to, const PolarMethod&) const override {
    sign(ctx, {.u = to.out, .x = in.x});
    copy_scaled(ctx, to.out, to.out, to.scale);
  }
  int64_t scratch_bytes(const Context&, const Shape&, DType, const PolarMethod&) const override {
    return whole_scratch_bytes();
  }
};
}  // namespace

const NormFamily& entry_norms() {
  static const EntryNorms family;
  return family;
}
