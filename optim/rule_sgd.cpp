// sgd: the gradient itself, or with normalize=1 its dual vector under the Frobenius norm (norm=rms: the RMS
// norm of vectors, which Scion uses for biases).
//
//   m = momentum m + g;  u = m, or g + momentum m with nesterov;   normalize: u / ||u||_F
//
// Without normalize this is steepest descent under the Frobenius norm with sharpness 1 / lr, not a dual
// vector; when its step size is measured (a sharpness, an escape velocity) the dual vector is used whatever
// normalize says. ema=1 makes m a mean instead of a sum.
#include "optim/rule_dual.h"

namespace {
class Sgd final : public Rule {
 public:
  explicit Sgd(Keyed& keys) : Rule(keys, 0.1) {
    static constexpr const char* kNorms[] = {"frobenius", "rms"};
    smoothing_ = read_smoothing(keys, {.beta = 0, .nesterov = false, .ema = false});
    normalize_ = keys.boolean("normalize", false);
    norm_ = *find_norm(keys.choice("norm", "frobenius", kNorms));
  }

  Norm norm() const override { return norm_; }
  std::string describe() const override { return norm_name(norm_) + (normalize_ ? "" : ", step 1/lr"); }
  std::vector<StateSpec> state(const Group& group) const override { return smoothing_.state(group.shape); }
  Lengths lengths(const Group& group) const override {
    return normalize_ && state(group).empty() ? lengths_of(norm_, group.transposed) : Lengths::none;
  }
  int64_t scratch_bytes(const Context& ctx, const Group& group) const override {
    return norm_scratch_bytes(ctx, norm_, group.shape, group.dtype);
  }

  bool fuses() const override { return true; }
  /// When it is measured, and so a dual vector.
  bool scale_free(const Group& group) const override { return state(group).empty(); }

  Measured direction(Context& ctx, Group& group, const RuleStep& step) const override {
    if (normalize_ || step.measure)
      return smooth_and_dualize(ctx, group, step, {.norm = norm_, .smoothing = smoothing_});
    if (step.apply != nullptr) {
      std::vector<Smooth> list;
      for (const Block& block : group.blocks) {
        list.push_back(smoothing_.operation(block, step));
        list.back().u = {};
        list.back().into = weight_of(block, step);
      }
      smooth(ctx, list);
      return {};
    }
    smoothing_.apply(ctx, group.blocks, step);
    return {};
  }

 private:
  /// Entry by entry, unless it divides by the length of the whole.
  bool treats_rows_apart(const Group&, bool measured) const override { return !normalize_ && !measured; }

  Smoothing smoothing_;
  bool normalize_;
  Norm norm_;
};
}  // namespace

std::unique_ptr<Rule> make_sgd(Keyed& keys) {
  return std::make_unique<Sgd>(keys);
}
