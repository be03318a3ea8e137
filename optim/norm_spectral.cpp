// The largest singular value, whose dual norm is the sum of all (the nuclear norm) and whose dual vector is
// the polar factor (Proposition 5): l2-l2, rms-rms and the scales that Muon is used with.
#include "optim/norm_family.h"
#include "optim/svd.h"

namespace {
class SpectralNorms final : public NormFamily {
 public:
  void values(Context& ctx, const NormInput& in, bool dual, std::span<double> values) const override {
    combine_singular_values(ctx, in.x, /*sum=*/dual, values);
  }
  void dualize(Context& ctx, const NormInput& in, const DualOutput& to,
               const PolarMethod& method) const override {
    copy_scaled(ctx, to.out, in.x, 1);
    polar(ctx, {.x = to.out, .method = method});
    copy_scaled(ctx, to.out, to.out, to.scale);
  }
  bool on_host(const PolarMethod& method) const override { return method.on_host(); }
  int64_t scratch_bytes(const Context& ctx, const Shape& batch, DType dtype,
                        const PolarMethod& method) const override {
    return std::max(svd_scratch_bytes(ctx, batch[1], batch[2]),
                    polar_scratch_bytes(ctx, batch, dtype, method));
  }
};
}  // namespace

const NormFamily& spectral_norms() {
  static const SpectralNorms family;
  return family;
}
