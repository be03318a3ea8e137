// Gradient of a bias that was added to every row: y = x + bias.
//
//   dbias[n] = sum over rows r of dy[r][n]          (+ the old dbias[n] when accumulating)
//
// The forward half has no operation of its own: it is the epilogue of matmul (matmul.h).
// Deterministic for any number of threads: threads share the columns, rows are added in a fixed order.
// Aliasing: none.
#pragma once

#include "model/kernels/context.h"

struct BiasBackward {
  Tensor dbias;             // (N), written
  Tensor dy;                // (..., N), read; float32
  bool accumulate = false;  // add to dbias instead of overwriting it
};

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
