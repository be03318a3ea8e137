// The largest attention logit of each head, from the largest of each row.
//
//   largest[h] = max over b, t of row_max[b][h][t],  or with accumulate the larger of that and what is there
//
// Accumulating over the micro-batches of a step gives S_h of QK clip (optim/qk_clip.h). A NaN is larger than
// all, and stays. Deterministic. largest is float64, though its values are float32: what a Readback takes.
#pragma once

#include "model/kernels/context.h"

struct HeadMax {
  Tensor largest;           // (NH) f64, written
  Tensor row_max;           // (B, NH, T) f32, as attention_forward leaves it; not empty
  bool accumulate = false;  // keep what is there where it is larger
};

namespace cpu {
void head_max(Context& ctx, const HeadMax& a);
}
namespace gpu {
void head_max(Context& ctx, const HeadMax& a);
}

/// Every row's number is read once.
inline Work work(const HeadMax& a) {
  return {.bytes = 1.0 * a.row_max.bytes()};
}

inline void head_max(Context& ctx, const HeadMax& a) {
  expect(a.row_max.shape.rank() == 3 && a.row_max.size() > 0, "head_max: row_max must be (B, NH, T)");
  expect_shape(a.largest, {a.row_max.shape[1]}, "head_max: largest");
  ON_DEVICE(head_max, ctx, a);
}
