#include "optim/hyperball.h"

#include "model/kernels/reduce.h"
#include "optim/update.h"

namespace {
/// x <- x / ||x|| * radius, for x as one row.
void to_radius(Context& ctx, const Tensor& x, const Tensor& norm, const Tensor& radius) {
  row_norms(ctx, {.norms = norm, .x = x});
  const Tensor lengths = norm.view({1, 1});
  scale_rows(ctx, {.y = lengths, .x = lengths, .scales = radius, .divide = true});
  scale_rows(ctx, {.y = x, .x = x, .scales = norm, .divide = true});
}
}  // namespace

int64_t hyperball_scratch_bytes(const Group& group) {
  const int64_t n = group.shape.size();
  return dtype_bytes(group.dtype) * (n + 1) + row_norms_scratch_bytes(1, n);
}

void hyperball(Context& ctx, std::span<const Block> blocks, double lr, bool first) {
  if (lr == 0) return;
  for (const Block& block : blocks) {
    Scratch::Frame frame(ctx.scratch);
    const Shape row{1, block.weight.size()};
    const Tensor w = block.weight.view(row), u = block.grad.view(row), radius = block.state.back().view({1});
    const Tensor y = frame.tensor(row, w.dtype), norm = frame.tensor({1}, w.dtype);
    if (first) row_norms(ctx, {.norms = radius, .x = w});
    to_radius(ctx, u, norm, radius);
    smooth(ctx, {.u = y, .g = w});
    apply_update(ctx, {.w = y, .u = u, .step = lr});
    to_radius(ctx, y, norm, radius);
    smooth(ctx, {.u = u, .g = w, .gain = 1 / lr});
    apply_update(ctx, {.w = u, .u = y, .step = 1 / lr});
  }
}
