// Gradient of a bias that was added to every row: y = x + bias.
//
//   dbias[n] = sum over rows r of dy[r][n]          (+ the old dbias[n] when accumulating)
//
// The forward half has no operation of its own: it is the epilogue of matmul (matmul.h).
// Shapes: dy (..., N), dbias (N). dtype: dy f32, or on a GPU bf16; dbias f32 always, and so are the sums.
// Deterministic, for any number of threads and on any GPU: on the CPU threads share the columns, rows are
// added in a fixed order; a GPU adds blocks of rows, whose bounds depend on the number of rows alone.
// Aliasing: none.
#pragma once

#include <algorithm>

#include "model/kernels/context.h"

struct BiasBackward {
  Tensor dbias;             // (N), written
  Tensor dy;                // (..., N), read
  bool accumulate = false;  // add to dbias instead of overwriting it
};

/// Rows that a GPU adds up without scratch, in one go.
inline constexpr int64_t kRowsInOneGo = 512;
/// Rows of dy per block of a GPU, when there are more than that: at most kRowsInOneGo blocks.
inline int64_t bias_backward_rows_per_block(int64_t rows) {
  return std::max<int64_t>(128, (rows + kRowsInOneGo - 1) / kRowsInOneGo);
}
/// Scratch that bias_backward takes: the column sums of every block. None on the CPU.
inline int64_t bias_backward_scratch_bytes(const Context& ctx, int64_t rows, int64_t N) {
  if (ctx.where == Where::cpu || rows <= kRowsInOneGo) return 0;
  const int64_t per_block = bias_backward_rows_per_block(rows);
  return (rows + per_block - 1) / per_block * N * int64_t{sizeof(float)};
}

/// One reading of dy.
inline Work work(const BiasBackward& args) {
  return {.bytes = 1.0 * args.dy.bytes()};
}

namespace cpu {
void bias_backward(Context& ctx, const BiasBackward& args);
}  // namespace cpu
namespace gpu {
void bias_backward(Context& ctx, const BiasBackward& args);
}  // namespace gpu

inline void bias_backward(Context& ctx, const BiasBackward& args) {
  expect_shape(args.dbias, {args.dy.cols()}, "bias_backward: dbias");
  ON_DEVICE(bias_backward, ctx, args);
}
