// The sum of the singular values, whose dual norm is the largest of them and whose dual vector has rank one:
// u_1 v_1^T of the largest singular value, the first pair that LAPACK gives where several are largest.
#include "optim/norm_family.h"
#include "optim/svd.h"

namespace {
class NuclearNorms final : public NormFamily {
 public:
  void values(Context& ctx, const NormInput& in, bool dual, std::span<double> values) const override {
    combine_singular_values(ctx, in.x, /*sum=*/!dual, values);
  }
  void dualize(Context& ctx, const NormInput& in, const DualOutput& to, const PolarMethod&) const override {
    copy_scaled(ctx, to.out, in.x, 1);
    for (int64_t i = 0; i < to.out.shape[0]; ++i) svd_polar(ctx, to.out[i], {.rank = 1});
    copy_scaled(ctx, to.out, to.out, to.scale);
  }
  bool on_host(const PolarMethod&) const override { return true; }
  int64_t scratch_bytes(const Context& ctx, const Shape& batch, DType, const PolarMethod&) const override {
    return svd_scratch_bytes(ctx, batch[1], batch[2]);
  }
};
}  // namespace

const NormFamily& nuclear_norms() {
  static const NuclearNorms family;
  return family;
}
