// rownorm and colnorm: unit rows or unit columns, the dual vectors of the operator norms into linf and out of
// l1 (Proposition 8). Rows and columns are the paper's, of W (out, in): for an embedding, which is stored
// (vocabulary, channels), column j is the vector of token j.
//
//   colnorm   norm=l1-rms    u_j = sqrt(out) g_j / ||g_j||_2        every column has RMS 1
//             norm=l1-l2     u_j = g_j / ||g_j||_2
//   rownorm   norm=rms-linf  u_i = g_i / (sqrt(in) ||g_i||_2)       every output has size 1 on inputs of RMS
//   1
//             norm=l2-linf   u_i = g_i / ||g_i||_2
//
// A zero row or column stays zero: a token that the batch did not contain does not move. momentum, nesterov
// and ema as for muon, off by default.
#include "optim/norm.h"
#include "optim/rule.h"

namespace {
class LineNorm final : public Rule {
 public:
  LineNorm(Keyed& keys, std::span<const char* const> norms) : Rule(keys, 0.02) {
    smoothing_ = read_smoothing(keys, {.beta = 0, .nesterov = false, .ema = true});
    norm_ = norm_kind(keys.choice("norm", norms[0], norms).c_str());
  }

  std::string norm_name() const override { return ::norm_name(norm_); }
  bool matrices_only() const override { return true; }
  std::vector<StateSpec> state(const Shape& block) const override { return smoothing_.state(block); }
  int64_t scratch_bytes(const Context& ctx, const Group& group) const override {
    return norm_scratch_bytes(ctx, norm_, group.shape);
  }

  double direction(Context& ctx, Group& group, const RuleStep& step) const override {
    smoothing_.apply(ctx, group.blocks, step);
    double dual = 0;
    for (const Block& block : group.blocks) {
      if (step.want_dual) dual += dual_norm(ctx, norm_, block.grad, group.transposed);
      dualize(ctx, {.out = block.grad, .g = block.grad, .norm = norm_, .transposed = group.transposed});
    }
    return dual;
  }

 private:
  Smoothing smoothing_;
  NormKind norm_;
};

constexpr const char* kRowNorms[] = {"rms-linf", "l2-linf"};
constexpr const char* kColumnNorms[] = {"l1-rms", "l1-l2"};
}  // namespace

std::unique_ptr<Rule> make_rownorm(Keyed& keys) {
  return std::make_unique<LineNorm>(keys, kRowNorms);
}
std::unique_ptr<Rule> make_colnorm(Keyed& keys) {
  return std::make_unique<LineNorm>(keys, kColumnNorms);
}
