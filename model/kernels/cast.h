// Copies that change how numbers are stored: their type, or their order.
//
//   cast        y[i] = x[i], between f32 and bf16, between f32 and f64, or within one of them
//   transpose   y[i][c][r] = x[i][r][c], for every matrix i of a batch
//
// Shapes: cast any, the same for both; transpose x (batch, rows, cols) and y (batch, cols, rows), or both
// without the batch. transpose: f32 or bf16, the same for both. f32 to bf16 and f64 to f32 round to nearest,
// ties to even; beyond the largest number they become infinite, and a NaN stays one. All else is exact.
// Aliasing: none. Deterministic.
#pragma once

#include "model/kernels/context.h"

struct Cast {
  Tensor y;  // written
  Tensor x;  // read
};

struct Transpose {
  Tensor y;  // (batch, cols, rows), written
  Tensor x;  // (batch, rows, cols), read
};

/// What a call must do at least: move each tensor once.
inline Work work(const Cast& args) {
  return {.bytes = 1.0 * (args.x.bytes() + args.y.bytes())};
}
inline Work work(const Transpose& args) {
  return {.bytes = 1.0 * (args.x.bytes() + args.y.bytes())};
}

namespace cpu {
void cast(Context& ctx, const Cast& args);
void transpose(Context& ctx, const Transpose& args);
}  // namespace cpu
namespace gpu {
void cast(Context& ctx, const Cast& args);
void transpose(Context& ctx, const Transpose& args);
}  // namespace gpu

inline void cast(Context& ctx, const Cast& args) {
  expect_shape(args.y, args.x.shape, "cast: y");
  ON_DEVICE(cast, ctx, args);
}

inline void transpose(Context& ctx, const Transpose& args) {
  const Shape& x = args.x.shape;
  expect(x.rank() == 2 || x.rank() == 3, "transpose: x must be (rows, cols) or (batch, rows, cols)");
  expect_shape(args.y, x.rank() == 2 ? Shape{x[1], x[0]} : Shape{x[0], x[2], x[1]}, "transpose: y");
  expect(args.y.dtype == args.x.dtype, "transpose: y and x must have the same dtype");
  ON_DEVICE(transpose, ctx, args);
}
