// q-norms of the rows or columns of matrices, and the vectors that attain them: what the norms l1->lp and
// lp->linf are made of (Proposition 8 of "Old Optimizer, New Norm", arXiv 2409.20325).
//
// A line x is a row or a column of a matrix, n its length; q in [1, inf], 1 / p + 1 / q = 1:
//
//   line_norms   ||x||_q = (sum |x_i|^q)^(1/q);  ||x||_inf = max |x_i|
//   line_duals   y = factor t, where t attains max <x, t> over ||t||_p <= 1, which is ||x||_q (Hoelder):
//                t_i = sign(x_i) |x_i|^(q-1) / ||x||_q^(q-1)
//                q = 1     t = sign(x); where x_i is 0, t_i is 0
//                q = 2     t = x / ||x||_2
//                q = inf   t = sign(x_i) at the largest |x_i|, the first of equals; 0 elsewhere
//
// So for W (out, in): ||W||_{l1->lp} is the largest p-norm of a column; its dual norm is the sum of the
// columns' q-norms, and its dual vector takes every column to its line_duals of exponent q. lp->linf: the
// same by rows.
//
// Shapes: one matrix (rows, cols) or a batch (batch, rows, cols), any sizes. float32 or float64; a GPU takes
// the same. Inside everything is float64 and relative to the largest entry of the line, so entries near 1e-20
// or 1e30 neither vanish nor overflow. A line of zeros has norm 0 and dual 0. A line with a NaN has norm NaN
// and is NaN throughout in its dual; a line with an infinity has norm infinity, and its dual is NaN
// throughout, too.
//
// Deterministic, also for any number of threads: every line is summed in an order that its length alone
// decides. No scratch. On a GPU both only enqueue work.
#pragma once

#include "model/kernels/context.h"

enum class Lines : uint8_t { rows, columns };

struct LineNorms {
  Tensor norms;  // as many as there are lines, matrix after matrix; any shape; dtype of x; written
  Tensor x;      // (rows, cols) or (batch, rows, cols)
  Lines lines;
  double q;  // 1 to infinity
};

struct LineDuals {
  Tensor y;  // shape and dtype of x, written; may be x
  Tensor x;  // (rows, cols) or (batch, rows, cols)
  Lines lines;
  double q;           // 1 to infinity: the exponent of the norm that is attained
  double factor = 1;  // of everything
};

/// How the lines of a tensor lie in memory: entry i of line l of matrix m is element
/// m * lines * length + l * across + i * along.
struct LineLayout {
  int64_t matrices, lines, length;  // lines of one matrix
  int64_t across, along;
};
inline LineLayout line_layout(const Shape& shape, Lines lines) {
  const int r = shape.rank() - 2;
  const int64_t matrices = r == 0 ? 1 : shape[0], rows = shape[r], cols = shape[r + 1];
  if (lines == Lines::rows) return {matrices, rows, cols, cols, 1};
  return {matrices, cols, rows, 1, cols};
}

/// The input read once, the output written once.
inline Work work(const LineNorms& args) {
  return {.bytes = 1.0 * (args.x.bytes() + args.norms.bytes())};
}
inline Work work(const LineDuals& args) {
  return {.bytes = 1.0 * (args.x.bytes() + args.y.bytes())};
}

namespace cpu {
void line_norms(Context& ctx, const LineNorms& args);
void line_duals(Context& ctx, const LineDuals& args);
}  // namespace cpu
namespace gpu {
void line_norms(Context& ctx, const LineNorms& args);
void line_duals(Context& ctx, const LineDuals& args);
}  // namespace gpu

/// What both doors ask of their input.
inline void expect_lines(const Tensor& x, double q) {
  expect(x.shape.rank() == 2 || x.shape.rank() == 3, "lines: need a matrix or a batch of matrices");
  expect(x.dtype == DType::f32 || x.dtype == DType::f64, "lines: need f32 or f64");
  expect(q >= 1, "lines: the exponent is below 1, need 1 to infinity");
}

inline void line_norms(Context& ctx, const LineNorms& args) {
  expect_lines(args.x, args.q);
  const LineLayout at = line_layout(args.x.shape, args.lines);
  expect(args.norms && args.norms.size() == at.matrices * at.lines, "line_norms: need a norm for each line");
  expect(args.norms.dtype == args.x.dtype, "line_norms: norms and x differ in dtype");
  ON_DEVICE(line_norms, ctx, args);
}

inline void line_duals(Context& ctx, const LineDuals& args) {
  expect_lines(args.x, args.q);
  expect_shape(args.y, args.x.shape, "line_duals: y");
  expect(args.y.dtype == args.x.dtype, "line_duals: y and x differ in dtype");
  ON_DEVICE(line_duals, ctx, args);
}
