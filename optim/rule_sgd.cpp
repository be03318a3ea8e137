// sgd: the gradient itself, or with normalize=1 its dual vector under the Frobenius norm (norm=rms: the RMS
// norm of vectors, which Scion uses for biases).
//
//   m = momentum m + g;  u = m, or g + momentum m with nesterov;   normalize: u / ||u||_F
//
// Without normalize this is steepest descent under the Frobenius norm with sharpness 1 / lr, not a dual
// vector; under a given sharpness the dual vector is used whatever normalize says. ema=1 makes m a mean
// instead of a sum.
#include "optim/norm.h"
#include "optim/rule.h"

namespace {
class Sgd final : public Rule {
 public:
  explicit Sgd(Keyed& keys) : Rule(keys, 0.1) {
    static constexpr const char* kNorms[] = {"frobenius", "rms"};
    smoothing_ = read_smoothing(keys, {.beta = 0, .nesterov = false, .ema = false});
    normalize_ = keys.boolean("normalize", false);
    norm_ = norm_kind(keys.choice("norm", "frobenius", kNorms).c_str());
  }

  std::string norm_name() const override {
    return std::string(::norm_name(norm_)) + (normalize_ ? "" : ", step 1/lr");
  }
  std::vector<StateSpec> state(const Shape& block) const override { return smoothing_.state(block); }
  int64_t scratch_bytes(const Context& ctx, const Group& group) const override {
    return norm_scratch_bytes(ctx, norm_, group.shape);
  }

  double direction(Context& ctx, Group& group, const RuleStep& step) const override {
    smoothing_.apply(ctx, group.blocks, step);
    double dual = 0;
    if (!normalize_ && !step.want_dual) return dual;
    for (const Block& block : group.blocks) {
      if (step.want_dual) dual += dual_norm(ctx, norm_, block.grad);
      dualize(ctx, {.out = block.grad, .g = block.grad, .norm = norm_});
    }
    return dual;
  }

 private:
  Smoothing smoothing_;
  bool normalize_;
  NormKind norm_;
};
}  // namespace

std::unique_ptr<Rule> make_sgd(Keyed& keys) {
  return std::make_unique<Sgd>(keys);
}
