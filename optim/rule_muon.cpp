// muon and spectral: the polar factor of the smoothed gradient, times a scale that says which norm it is the
// dual vector of.
//
//   m = momentum m + (1 - momentum) g                 ema=0: m = momentum m + g
//   u = scale * polar((1 - momentum) g + momentum m)  nesterov=0: scale * polar(m)
//
//   scale=none        1                               norm l2->l2
//   scale=rms         sqrt(out / in)                  norm RMS->RMS
//   scale=keller      sqrt(max(1, out / in))          l2->l2 divided by that
//   scale=moonlight   0.2 sqrt(max(out, in))          elements of u of about 0.2, as Adam's
//
// muon defaults to momentum 0.95 with Nesterov, Keller's five steps and scale; spectral to no momentum, Polar
// Express and scale none. K. Jordan, "Muon"; Liu et al., arXiv 2502.16982 (moonlight). Each matrix of a fused
// q, k, v parameter is orthogonalised alone. Matrices of one shape are copied together and iterated as
// batches.
//
// Asked for a dual norm it reports <g, u> with g the smoothed gradient: exact for ns=svd, and what the step
// really achieves to first order for the approximate methods.
#include <algorithm>
#include <cmath>

#include "error.h"
#include "model/kernels/reduce.h"
#include "optim/polar.h"
#include "optim/rule.h"
#include "optim/update.h"

namespace {
constexpr const char* kScales[] = {"keller", "rms", "moonlight", "none"};
constexpr int64_t kBatchBytes = int64_t{32} << 20;  // of matrices gathered together

/// What muon and spectral start from.
struct Defaults {
  double lr;
  Smoothing smoothing;
  const char* method;
  const char* scale;
};

class Muon final : public Rule {
 public:
  Muon(Keyed& keys, const Defaults& defaults) : Rule(keys, defaults.lr) {
    smoothing_ = read_smoothing(keys, defaults.smoothing);
    const std::string method = keys.choice("ns", defaults.method, polar_names());
    const auto names = polar_names();
    method_ = static_cast<PolarMethod>(std::find(names.begin(), names.end(), method) - names.begin());
    steps_ = static_cast<int>(keys.integer("steps", 0, 0, 100));  // 0: the method's own
    scale_ = keys.choice("scale", defaults.scale, kScales);
    if (method_ == PolarMethod::svd && steps_ != 0)
      throw UsageError("ns=svd takes no steps, " + keys.option() + " " + keys.name() + ", leave steps out");
  }

  std::string norm_name() const override {
    if (scale_ == "rms") return "rms-rms";
    if (scale_ == "none") return "l2-l2";
    return scale_ == "keller" ? "l2-l2 / sqrt(max(1, out/in))" : "l2-l2 / (0.2 sqrt(max(out, in)))";
  }
  bool matrices_only() const override { return true; }
  std::vector<StateSpec> state(const Shape& block) const override { return smoothing_.state(block); }

  int64_t scratch_bytes(const Context&, const Group& group) const override {
    const Shape batch = batch_shape(group);
    return 4 * batch.size() + 64 + polar_scratch_bytes(batch, method_, steps_);
  }

  double direction(Context& ctx, Group& group, const RuleStep& step) const override {
    smoothing_.apply(ctx, group, step);
    Scratch::Frame frame(ctx.scratch);
    const Tensor batch = frame.tensor(batch_shape(group));
    const float scale = static_cast<float>(scale_of(group));
    double dual = 0;
    for (size_t first = 0; first < group.blocks.size(); first += static_cast<size_t>(batch.shape[0])) {
      const int64_t count = std::min(batch.shape[0], static_cast<int64_t>(group.blocks.size() - first));
      for (int64_t i = 0; i < count; ++i)
        smooth(ctx, {.u = batch[i], .g = group.blocks[first + static_cast<size_t>(i)].grad});
      polar(ctx, {.x = batch.slice(0, count), .method = method_, .steps = steps_});
      for (int64_t i = 0; i < count; ++i) {
        const Tensor& grad = group.blocks[first + static_cast<size_t>(i)].grad;
        if (step.want_dual) dual += static_cast<double>(scale) * dot(ctx, grad, batch[i]);
        smooth(ctx, {.u = grad, .g = batch[i], .gain = scale});
      }
    }
    return dual;
  }

 private:
  /// As many matrices as fit in kBatchBytes, at least one.
  static Shape batch_shape(const Group& group) {
    const int64_t fit = std::max<int64_t>(kBatchBytes / (4 * group.shape.size()), 1);
    return {std::min(fit, static_cast<int64_t>(group.blocks.size())), group.shape[0], group.shape[1]};
  }

  double scale_of(const Group& group) const {
    const double out = static_cast<double>(group.out()), in = static_cast<double>(group.in());
    if (scale_ == "rms") return std::sqrt(out / in);
    if (scale_ == "keller") return std::sqrt(std::max(1.0, out / in));
    if (scale_ == "moonlight") return 0.2 * std::sqrt(std::max(out, in));
    return 1;
  }

  Smoothing smoothing_;
  PolarMethod method_;
  int steps_;
  std::string scale_;
};
}  // namespace

std::unique_ptr<Rule> make_muon(Keyed& keys) {
  return std::make_unique<Muon>(keys, Defaults{.lr = 0.02,
                                               .smoothing = {.beta = 0.95, .nesterov = true, .ema = true},
                                               .method = "keller5",
                                               .scale = "keller"});
}

std::unique_ptr<Rule> make_spectral(Keyed& keys) {
  return std::make_unique<Muon>(keys, Defaults{.lr = 0.02,
                                               .smoothing = {.beta = 0, .nesterov = false, .ema = true},
                                               .method = "polar-express",
                                               .scale = "none"});
}
