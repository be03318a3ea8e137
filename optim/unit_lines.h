// Directions whose rows or columns all have one Euclidean length, and the weight that they move:
//
//   u_l = factor g_l / ||g_l||_2 for every row or every column l of g (rows, cols); 0 where the line is 0
//   into: w <- w - decay w - step u (update.h)
//
// A whole tensor is one row: g.view({1, n}). These are the dual vectors of the Frobenius and RMS norms, of
// l1->l2, l1->RMS, l2->linf and RMS->linf (norm.h).
//
// u (rows, cols), of g's dtype, f32 or f64; may be g. w any shape of as many elements, of the same dtype.
// Kept or moved, u is the same, bit for bit, and moving is apply_update, bit for bit. Sums of squares are
// float64 (reduce.h). A line with a NaN is NaN throughout; one with an infinity is NaN there and 0 elsewhere.
// While into.guard is NaN, nothing is written.
//
// Deterministic, also for any number of threads. On a GPU it only enqueues work. Memory that is moved: g
// once, u or w on top; where norms are not given, g once more for lines that the caches cannot hold, and on a
// GPU for all. row_norms and col_norms (reduce.h) take them, with the same bits. Scratch:
// unit_lines_scratch_bytes().
#pragma once

#include "model/kernels/reduce.h"
#include "optim/lines.h"
#include "optim/update.h"

struct UnitLines {
  Tensor u = {};      // written; may be g. Absent: not kept
  Tensor g;           // (rows, cols)
  Lines lines;        // which lines are given their length
  double factor = 1;  // that length
  Tensor norms = {};  // (lines) ||g_l||_2, of g's dtype, where they are known; absent: measured here
  ApplyTo into = {};  // the weight that u moves
};

/// Scratch for g (rows, cols) of this dtype.
inline int64_t unit_lines_scratch_bytes(int64_t rows, int64_t cols, Lines lines, DType dtype) {
  if (lines == Lines::rows) return dtype_bytes(dtype) * rows + row_norms_scratch_bytes(rows, cols);
  return 2 * dtype_bytes(dtype) * cols + col_norms_scratch_bytes(rows, cols);
}

inline Work work(const UnitLines& args) {
  return {.bytes = bytes_of(args.g) + bytes_of(args.u) + work(args.into).bytes};
}

namespace cpu {
void unit_lines(Context& ctx, const UnitLines& args);
}  // namespace cpu
namespace gpu {
void unit_lines(Context& ctx, const UnitLines& args);
}  // namespace gpu

inline void unit_lines(Context& ctx, const UnitLines& args) {
  expect(args.g.shape.rank() == 2, "unit_lines: g must be a matrix");
  if (args.u) expect_shape(args.u, args.g.shape, "unit_lines: u");
  expect_directed(args.u, args.g, args.into, "unit_lines: w or copy do not fit g, or u not w");
  expect(!args.norms || (args.norms.dtype == args.g.dtype &&
                         args.norms.size() == (args.lines == Lines::rows ? args.g.rows() : args.g.cols())),
         "unit_lines: need a norm of g's dtype for each line");
  expect((!args.u || args.u.dtype == args.g.dtype) && (!args.into.w || args.into.w.dtype == args.g.dtype),
         "unit_lines: u and w need the dtype of g");
  ON_DEVICE(unit_lines, ctx, args);
}
