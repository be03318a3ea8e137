// What an escape velocity needs of one tensor, in one pass over memory (escape.h):
//
//   along = <g, start - w>                  how far the way travelled still goes downhill
//   s     <- beta s + gain g;   dual = ||s||_1      Prodigy's denominator
//         without s: dual = 0, or with `sizes` ||g||_1
//   then  adam_direction (update.h) of g, which may move w, after the sums have read them. The results are
//         those of the two operations; g and w are read once for both.
//
// Any shape; all tensors have the same number of elements and the same dtype, f32 or f64, and none overlap.
// Sums are float64 and in an order that depends on the size alone: deterministic, also for any number of
// threads. A NaN or infinity in the input makes the sums non-finite. Waits for the numbers. On a GPU it takes
// whole_scratch_bytes() of scratch.
#pragma once

#include "model/kernels/reduce.h"
#include "optim/escape.h"
#include "optim/update.h"

struct EscapeSums {
  Tensor g;                             // gradient
  Tensor w, start;                      // the weight now and before the first step
  Tensor s = {};                        // the running sum of gradients, updated; absent: none
  double beta = 0;                      // how much of the old s is kept
  double gain = 1;                      // how much of g is added
  bool sizes = false;                   // without s: dual = ||g||_1
  const AdamDirection* then = nullptr;  // of the same g, and of w or no weight; null: none
};

/// Everything read once, s written once; of `then` what comes on top.
inline Work work(const EscapeSums& a) {
  Work sum{.flops = (a.s       ? 6.0
                     : a.sizes ? 4.0
                               : 3.0) *
                    static_cast<double>(a.g.size()),
           .bytes = static_cast<double>(a.g.bytes()) * (a.s ? 5 : 3)};
  if (a.then == nullptr) return sum;
  const Work then = work(*a.then);
  sum.flops += then.flops;
  sum.bytes += then.bytes - bytes_of(a.g) - bytes_of(a.then->into.w);
  return sum;
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
  if (args.then != nullptr) {
    const Tensor& moved = args.then->into.w;
    expect(args.then->g.data == args.g.data && (!moved || moved.data == args.w.data),
           "escape_sums: what comes then has another g or w");
    expect_adam({args.then, 1});
  }
  ON_DEVICE(escape_sums, ctx, args);
}
