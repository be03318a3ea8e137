// What an escape velocity needs of one tensor, in one pass over memory (escape.h):
//
//   along = <g, start - w>                  how far the way travelled still goes downhill
//   s     <- beta s + gain g;   dual = ||s||_1      Prodigy's denominator; without s: dual = 0
//
// Any shape; all tensors have the same number of elements and the same dtype, f32 or f64, and none overlap.
// Sums are float64 and in an order that depends on the size alone: deterministic, also for any number of
// threads. A NaN or infinity in the input makes the sums non-finite. Waits for the numbers. On a GPU it takes
// whole_scratch_bytes() of scratch.
#pragma once

#include "model/kernels/reduce.h"
#include "optim/escape.h"

struct EscapeSums {
  Tensor g;         // gradient
  Tensor w, start;  // the weight now and before the first step
  Tensor s = {};    // the running sum of gradients, updated; absent: none
  double beta = 0;  // how much of the old s is kept
  double gain = 1;  // how much of g is added
};

/// Everything read once, s written once.
inline Work work(const EscapeSums& a) {
  return {.flops = (a.s ? 6.0 : 3.0) * static_cast<double>(a.g.size()),
          .bytes = static_cast<double>(a.g.bytes()) * (a.s ? 5 : 3)};
}

namespace cpu {
Measured escape_sums(Context& ctx, const EscapeSums& args);
}  // namespace cpu
namespace gpu {
Measured escape_sums(Context& ctx, const EscapeSums& args);
}  // namespace gpu

inline Measured escape_sums(Context& ctx, const EscapeSums& args) {
  for (const Tensor& x : {args.w, args.start, args.s ? args.s : args.g})
    expect(x && x.size() == args.g.size() && x.dtype == args.g.dtype,
           "escape_sums: w, start or s do not fit g in size or dtype");
  ON_DEVICE(escape_sums, ctx, args);
}
