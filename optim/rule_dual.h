// The rule that most others are: the dual vector of the smoothed gradient under some norm (norm.h),
//
//   u = radius dualize(smooth(g))
//
// muon, spectral, sign, signum, colnorm, rownorm, scion and steepest differ in the norm, the smoothing and
// the keys that they offer; their files say which. Polar factors of equal matrices are computed as one batch,
// in bf16 where the model computes in bf16 (but for what runs on the host). Signs are taken while the
// gradient is smoothed.
#pragma once

#include "optim/rule.h"

/// Reads the keys ns and steps: how to compute polar factors.
PolarMethod read_polar(Keyed& keys, const char* fallback);

class DualRule : public Rule {
 public:
  struct Parts {
    Norm norm;
    Smoothing smoothing = {};
    PolarMethod polar = {};  // for the norms of singular values
    double radius = 1;
  };

  Norm norm() const override { return parts_.norm; }
  bool matrices_only() const override;
  bool waits() const override { return is_spectral(parts_.norm) && parts_.polar.on_host(); }
  bool fuses() const override { return parts_.norm.kind == NormKind::l1_linf; }
  std::vector<StateSpec> state(const Shape& block) const override { return parts_.smoothing.state(block); }
  int64_t scratch_bytes(const Context& ctx, const Group& group) const override;
  Measured direction(Context& ctx, Group& group, const RuleStep& step) const override;

 protected:
  DualRule(Keyed& keys, double default_lr) : Rule(keys, default_lr) {}
  /// To be called by the constructor of the rule, when it has read its keys.
  void set(Parts parts) { parts_ = std::move(parts); }
  const Parts& parts() const { return parts_; }
  /// Changes the polar factors `batch` (blocks, ...) of some blocks before they are scaled: NorMuon.
  virtual void refine(Context& ctx, std::span<const Block> blocks, const Tensor& batch) const;

 private:
  Measured signs(Context& ctx, Group& group, const RuleStep& step) const;
  Measured spectral(Context& ctx, Group& group, const RuleStep& step) const;
  Measured spectral_batch(Context& ctx, std::span<const Block> blocks, const Tensor& batch, double scale,
                          const RuleStep& step) const;
  void scale_by_radius(Context& ctx, const Group& group) const;
  DType batch_dtype(const Context& ctx, const Group& group) const;
  Shape batch_shape(const Context& ctx, const Group& group) const;

  Parts parts_;
};
