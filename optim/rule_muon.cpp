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
// batches, which are bf16 where the model computes in bf16 (but for svd).
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

  bool on_host() const override { return method_ == PolarMethod::svd; }

  int64_t scratch_bytes(const Context& ctx, const Group& group) const override {
    const Shape batch = batch_shape(ctx, group);
    return dtype_bytes(batch_dtype(ctx)) * batch.size() +
           std::max(polar_scratch_bytes(ctx, batch, batch_dtype(ctx), method_, steps_),
                    whole_scratch_bytes());
  }

  double direction(Context& ctx, Group& group, const RuleStep& step) const override {
    Scratch::Frame frame(ctx.scratch);
    const Tensor batch = frame.tensor(batch_shape(ctx, group), batch_dtype(ctx));
    const std::span<const Block> all = group.blocks;
    double dual = 0;
    for (size_t first = 0; first < all.size(); first += static_cast<size_t>(batch.shape[0])) {
      const auto blocks =
          all.subspan(first, std::min(static_cast<size_t>(batch.shape[0]), all.size() - first));
      const Tensor matrices = batch.slice(0, static_cast<int64_t>(blocks.size()));
      dual += directions(ctx, blocks, matrices, static_cast<float>(scale_of(group)), step);
    }
    return dual;
  }

 private:
  /// All matrices of a batch: gathered, orthogonalised, scattered.
  double directions(Context& ctx, std::span<const Block> blocks, const Tensor& batch, float scale,
                    const RuleStep& step) const {
    if (step.want_dual) {  // then the smoothed gradients are needed once more
      smoothing_.apply(ctx, blocks, step);
      Smoothing().apply_to(ctx, batch, blocks, {});
    } else {
      smoothing_.apply_to(ctx, batch, blocks, step);
    }
    polar(ctx, {.x = batch, .method = method_, .steps = steps_});
    double dual = 0;
    std::vector<Smooth> list;
    for (size_t i = 0; i < blocks.size(); ++i) {
      const Tensor factor = batch[static_cast<int64_t>(i)];
      if (step.want_dual) dual += static_cast<double>(scale) * dot(ctx, blocks[i].grad, factor);
      list.push_back({.u = blocks[i].grad, .g = factor, .gain = scale});
    }
    smooth(ctx, list);
    return dual;
  }

  DType batch_dtype(const Context& ctx) const { return method_ == PolarMethod::svd ? DType::f32 : ctx.dtype; }
  /// As many matrices as should be gathered together, at least one: what the caches of a CPU hold, all of
  /// most models' on a GPU.
  Shape batch_shape(const Context& ctx, const Group& group) const {
    const int64_t most = ctx.where == Where::cpu ? int64_t{32} << 20 : int64_t{1} << 30;
    const int64_t fit = std::max<int64_t>(most / (dtype_bytes(batch_dtype(ctx)) * group.shape.size()), 1);
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
