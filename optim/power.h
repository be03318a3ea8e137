// Powers of numbers that stay where they are, such as norms:
//
//   power    y[i] = x[i]^exponent for x[i] > 0, 0 for x[i] = 0 (also when the exponent is negative: what a
//            zero norm scales is zero), NaN for anything else
//
// Meant for few numbers. Computed in float64. f32 or f64.
#pragma once

#include "model/kernels/context.h"

struct Power {
  Tensor y;  // any shape, written, dtype of x; may be x
  Tensor x;
  double exponent;
};

namespace cpu {
void power(Context& ctx, const Power& args);
}  // namespace cpu
namespace gpu {
void power(Context& ctx, const Power& args);
}  // namespace gpu

inline Work work(const Power& args) {
  return {.bytes = 1.0 * (args.x.bytes() + args.y.bytes())};
}

inline void power(Context& ctx, const Power& args) {
  expect_shape(args.y, args.x.shape, "power: y");
  expect(args.y.dtype == args.x.dtype, "power: y needs the dtype of x");
  ON_DEVICE(power, ctx, args);
}
