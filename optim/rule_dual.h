// The rule that most others are: the dual vector of the smoothed gradient under some norm (norm.h),
//
//   u = radius dualize(smooth(g))
//
// muon, normuon, spectral, sign, signum, lion, colnorm, rownorm, scion and steepest differ in the norm, the
// smoothing and the keys that they offer; their files say which. Polar factors of equal matrices are computed
// as one batch, in bf16 where the model computes in bf16 (but for what runs on the host). Signs are taken
// while the gradient is smoothed, and move the weight in that pass; Euclidean lengths are measured first, and
// move the weight in the pass that gives them (moves() of norm.h); without a memory they are those of the
// gradient, which the step has measured (Rule::lengths).
//
// With a radius the norm that the rule descends under is norm() / radius: dual norms are those of norm(),
// times the radius. A vector is a matrix of one column; its RMS->RMS norm is its RMS norm.
#pragma once

#include "optim/rule.h"

/// Reads the keys ns, steps and ns_eps: how to compute polar factors (polar_method.h). ns_eps is not called
/// eps, because rules that divide by second moments have that.
PolarMethod read_polar(Keyed& keys, const char* fallback);
/// Reads the key norm. `family` says what it must be one of, `legal` the same in words; null: any norm.
Norm read_norm(Keyed& keys, const char* fallback, bool (*family)(const Norm&) = nullptr,
               const char* legal = nullptr);

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
  bool waits() const override { return on_host(parts_.norm, &parts_.polar); }
  bool fuses() const override { return parts_.norm.kind == NormKind::l1_linf || moves(parts_.norm); }
  bool scale_free(const Group& group) const override { return state(group).empty() && parts_.polar.eps == 0; }
  std::vector<StateSpec> state(const Group& group) const override {
    return parts_.smoothing.state(group.shape);
  }
  Lengths lengths(const Group& group) const override {
    return state(group).empty() ? lengths_of(norm_of(group), group.transposed) : Lengths::none;
  }
  double work(const Group& group) const override;
  int64_t scratch_bytes(const Context& ctx, const Group& group) const override;
  Measured direction(Context& ctx, Group& group, const RuleStep& step) const override;

 protected:
  DualRule(Keyed& keys, double default_lr, double default_decay = 0)
      : Rule(keys, default_lr, default_decay) {}
  /// To be called by the constructor of the rule, when it has read its keys.
  void set(Parts parts) { parts_ = std::move(parts); }
  const Parts& parts() const { return parts_; }
  /// What refine() is told: some blocks of a group and their polar factors (blocks, ...), as they are stored.
  struct Factors {
    const Group& group;
    std::span<const Block> blocks;
    Tensor batch;
  };
  /// Changes the polar factors before they are scaled: NorMuon.
  virtual void refine(Context& ctx, const Factors& factors, const RuleStep& step) const;
  /// The most polar factors that are computed together: (blocks, ...).
  Shape batch_shape(const Context& ctx, const Group& group) const;

 private:
  bool treats_rows_apart(const Group& group, bool) const override {
    return ::rows_apart(norm_of(group), group.transposed);
  }
  Measured signs(Context& ctx, Group& group, const RuleStep& step) const;
  Measured spectral(Context& ctx, Group& group, const RuleStep& step) const;
  Measured spectral_batch(Context& ctx, const Factors& factors, const RuleStep& step) const;
  DType batch_dtype(const Context& ctx, const Group& group) const;
  Norm norm_of(const Group& group) const;

  Parts parts_;
};

/// What DualRule::direction does for norms that are dualized by one function: smooths and dualizes. Without a
/// memory directions come from the gradients as they are: the clip factor changes no dual vector.
Measured smooth_and_dualize(Context& ctx, Group& group, const RuleStep& step, const DualRule::Parts& parts);

/// The parts of muon, read from its keys: momentum, nesterov, ema, ns, steps and scale.
DualRule::Parts read_muon(Keyed& keys, const Smoothing& smoothing, const char* ns, const char* scale);
