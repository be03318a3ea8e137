#include "optim/kronecker.h"

#include "model/kernels/matmul.h"
#include "model/kernels/reduce.h"
#include "optim/update.h"

std::string factor_name(Side side) {
  return side == Side::left ? "L" : "R";
}

Tensor room_for(const Tensor& memory, const Tensor& x, Side side) {
  const int64_t N = x.shape[0], n = side_length(side, x.shape[1], x.shape[2]);
  return memory.view({memory.size()}).slice(0, N * n * n).view({N, n, n});
}

void bound(Context& ctx, const Tensor& x) {
  const int64_t N = x.shape[0];
  std::vector<Tensor> matrices;
  for (int64_t i = 0; i < N; ++i) matrices.push_back(x[i]);
  Scratch::Frame frame(ctx.scratch);
  const Tensor sums = frame.tensor({N}, DType::f64), norm = frame.tensor({1}, DType::f64);
  const Tensor scales = frame.tensor({N});
  sums_of_squares(ctx, {.sums = sums, .tensors = matrices});
  std::vector<Smooth> list;
  for (int64_t i = 0; i < N; ++i) {
    clip_factor(ctx, {.sums = sums.slice(i, 1),
                      .limit = x.dtype == DType::f64 ? 1e150 : 1e18,
                      .norm = norm,
                      .scale = scales.slice(i, 1)});
    list.push_back({.u = x[i], .g = x[i], .scale = scales.slice(i, 1)});
  }
  smooth(ctx, list);
}

int64_t bound_scratch_bytes(int64_t N, int64_t size) {
  const std::vector<Tensor> matrices(static_cast<size_t>(N), Tensor(static_cast<float*>(nullptr), {size}));
  return 12 * N + 8 + sums_of_squares_scratch_bytes(matrices);
}

void gram(Context& ctx, const Tensor& products, const Tensor& x, Side side) {
  batched_matmul(ctx, {.c = products,
                       .a = x,
                       .b = x,
                       .transpose_a = side == Side::right,
                       .transpose_b = side == Side::left,
                       .symmetric = true});
}

void accumulate(Context& ctx, std::span<const StateValue> list, double beta, double gain,
                const RuleStep& step) {
  std::vector<Smooth> squares, means;
  for (const auto& [state, value] : list) {
    squares.push_back({.u = value, .g = value, .scale = step.grad_scale});
    means.push_back({.m = state, .g = value, .beta = beta, .gain = gain, .scale = step.grad_scale});
  }
  if (step.clips) smooth(ctx, squares);
  smooth(ctx, means);
}

void keep(Context& ctx, std::span<const StateValue> list, const RuleStep& step) {
  std::vector<ApplyUpdate> copies;  // state - 1 state + value
  for (const auto& [state, value] : list)
    copies.push_back({.w = state, .u = value, .step = -1, .decay = 1, .guard = step.grad_scale});
  apply_update(ctx, copies);
}
