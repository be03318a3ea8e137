// normuon: muon whose update is as large in every row. With O the polar factor that muon computes:
//
//   v = beta2 v + (1 - beta2) mean of O^2 over each row           (one number for each output)
//   P = O / (sqrt(v) + 1e-8), row by row;   u = scale P ||O||_F / ||P||_F
//
// Li et al., "NorMuon", arXiv 2510.05491. No bias correction: the rescaling to the size of O removes it. All
// other keys as for muon. axis=rows is the paper's; axis=auto evens columns where in > out, as modded-nanogpt
// does, since the rows of a wide polar factor are of one size already. The dual norm that a sharpness asks
// for is <m, u>, as for muon: what the step achieves to first order.
#include <cmath>

#include "model/kernels/reduce.h"
#include "optim/rule_dual.h"
#include "optim/update.h"

namespace {
constexpr double kEps = 1e-8;

class NorMuon final : public DualRule {
 public:
  explicit NorMuon(Keyed& keys) : DualRule(keys, 0.02) {
    static constexpr const char* kAxes[] = {"rows", "auto"};
    beta2_ = keys.number("beta2", 0.95, 0, 0.999999);
    auto_axis_ = keys.choice("axis", "rows", kAxes) == "auto";
    set(read_muon(keys, {.beta = 0.95, .nesterov = true, .ema = true}, "keller5", "keller"));
  }
  std::string describe() const override {
    return norm_name(norm()) + (auto_axis_ ? ", the longer side evened" : ", rows evened");
  }

  std::vector<StateSpec> state(const Group& group) const override {
    std::vector<StateSpec> specs = DualRule::state(group);
    specs.push_back({.name = "v", .shape = {lines_of(group), 1}});
    return specs;
  }
  int64_t scratch_bytes(const Context& ctx, const Group& group) const override {
    const int64_t blocks = batch_shape(ctx, group)[0], lines = lines_of(group);
    return DualRule::scratch_bytes(ctx, group) + guard_scratch_bytes() +
           dtype_bytes(group.dtype) * blocks * (2 * lines + 2) +
           std::max({row_norms_scratch_bytes(blocks * group.shape[0], group.shape[1]),
                     col_norms_scratch_bytes(group.shape[0], group.shape[1]),
                     row_norms_scratch_bytes(blocks, lines)});
  }

 protected:
  void refine(Context& ctx, const Factors& factors, const RuleStep& step) const override;

 private:
  /// Whether v belongs to the paper's rows, and whether to rows of the storage.
  bool by_rows(const Group& group) const { return !auto_axis_ || group.out() >= group.in(); }
  bool by_stored_rows(const Group& group) const { return by_rows(group) != group.transposed; }
  int64_t lines_of(const Group& group) const { return by_rows(group) ? group.out() : group.in(); }

  double beta2_;
  bool auto_axis_;
};

/// Norms of the lines (rows or columns) of every matrix of a batch: (batch, lines).
void line_sizes(Context& ctx, const Tensor& sizes, const Tensor& batch, bool by_rows) {
  const int64_t rows = batch.shape[0] * batch.shape[1], cols = batch.shape[2];
  if (by_rows) return row_norms(ctx, {.norms = sizes.view({rows}), .x = batch.view({rows, cols})});
  for (int64_t i = 0; i < batch.shape[0]; ++i) col_norms(ctx, {.norms = sizes[i], .x = batch[i]});
}

/// Multiplies the lines by `factors` (batch, lines).
void scale_lines(Context& ctx, const Tensor& batch, const Tensor& factors, bool by_rows) {
  const int64_t rows = batch.shape[0] * batch.shape[1];
  const Tensor flat = batch.view({rows, batch.shape[2]});
  if (by_rows) return scale_rows(ctx, {.y = flat, .x = flat, .scales = factors.view({rows})});
  for (int64_t i = 0; i < batch.shape[0]; ++i)
    scale_cols(ctx, {.y = batch[i], .x = batch[i], .scales = factors[i]});
}

// With r the norms of O's lines, a = (r / sqrt(length)) / (sqrt(v) + eps) is the size of P's lines, but for a
// common factor: Adam's direction without a first moment. So P ||O|| / ||P|| is O with its lines multiplied
// by (a / r) ||r|| / ||a||, and the matrices are read twice and written once.
void NorMuon::refine(Context& ctx, const Factors& factors, const RuleStep& step) const {
  const auto& [group, blocks, batch] = factors;
  const bool by_rows = by_stored_rows(group);
  const int64_t count = batch.shape[0], lines = lines_of(group);
  const size_t v = DualRule::state(group).size();
  Scratch::Frame frame(ctx.scratch);
  const Tensor r = frame.tensor({count, lines}, group.dtype), a = frame.tensor({count, lines}, group.dtype),
               r_size = frame.tensor({count}, group.dtype), a_size = frame.tensor({count}, group.dtype),
               guard = guard_of(ctx, frame, step);
  line_sizes(ctx, r, batch, by_rows);
  smooth(ctx, {.u = a,
               .g = r,
               .gain = std::sqrt(static_cast<double>(lines) / static_cast<double>(group.shape.size()))});
  std::vector<AdamDirection> list;
  for (int64_t i = 0; i < count; ++i)
    list.push_back({.u = a[i],
                    .v = blocks[static_cast<size_t>(i)].state[v].view({lines}),
                    .g = a[i],
                    .beta1 = 0,
                    .beta2 = beta2_,
                    .eps = kEps,
                    .scale = guard});
  adam_direction(ctx, list);
  row_norms(ctx, {.norms = r_size, .x = r});
  row_norms(ctx, {.norms = a_size, .x = a});
  const Tensor each = a.view({count * lines, 1});
  scale_rows(ctx, {.y = each, .x = each, .scales = r.view({count * lines}), .divide = true});
  scale_rows(ctx, {.y = a, .x = a, .scales = a_size, .divide = true, .times = r_size});
  scale_lines(ctx, batch, a, by_rows);
}
}  // namespace

std::unique_ptr<Rule> make_normuon(Keyed& keys) {
  return std::make_unique<NorMuon>(keys);
}
