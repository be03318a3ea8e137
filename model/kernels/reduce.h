// Sums, norms and scalings of whole tensors, rows and columns. The optimizer's norms are made of these.
//
// Whole tensors (any shape):      sum_of_squares = sum x^2      dot = sum a b      max_abs = max |x|
// Matrices (rows, cols):          row_norms  norms[r] = sqrt(sum over c of x[r][c]^2)
//                                 col_norms  norms[c] = sqrt(sum over r of x[r][c]^2)
//                                 scale_rows y[r][c] = factor x[r][c] s[r]     or / s[r]
//                                 scale_cols y[r][c] = factor x[r][c] s[c]     or / s[c]
//
// Sums are float64 inside, so squares of float32 neither overflow nor vanish. A NaN or infinity anywhere in
// the input makes the result non-finite. Deterministic for any number of threads: sums run over chunks whose
// bounds depend on the size alone, and the chunks' sums are added in order. dtype float32.
#pragma once

#include "model/kernels/context.h"

struct RowNorms {
  Tensor norms;  // (rows), written: Euclidean
  Tensor x;      // (rows, cols)
};

struct ColNorms {
  Tensor norms;  // (cols), written: Euclidean
  Tensor x;      // (rows, cols)
};

struct ScaleRows {
  Tensor y;             // (rows, cols), written; may be x
  Tensor x;             // (rows, cols)
  Tensor scales;        // (rows)
  float factor = 1;     // of everything
  bool divide = false;  // divide by the scales; where a scale is 0 the result is 0
};

struct ScaleCols {
  Tensor y;             // (rows, cols), written; may be x
  Tensor x;             // (rows, cols)
  Tensor scales;        // (cols)
  float factor = 1;     // of everything
  bool divide = false;  // divide by the scales; where a scale is 0 the result is 0
};

/// Scratch that col_norms takes: float64 sums of every column.
inline int64_t col_norms_scratch_bytes(int64_t cols) {
  return (cols + 7) / 8 * 8 * int64_t{sizeof(double)};
}

/// Every input read once, every tensor-sized output written once.
inline Work work(const Tensor& x) {
  return {.bytes = 1.0 * x.bytes()};
}
inline Work work(const Tensor& a, const Tensor& b) {
  return {.bytes = 1.0 * (a.bytes() + b.bytes())};
}
inline Work work(const RowNorms& args) {
  return work(args.x);
}
inline Work work(const ColNorms& args) {
  return work(args.x);
}
inline Work work(const ScaleRows& args) {
  return work(args.x, args.y);
}
inline Work work(const ScaleCols& args) {
  return work(args.x, args.y);
}

namespace cpu {
double sum_of_squares(Context& ctx, const Tensor& x);
double dot(Context& ctx, const Tensor& a, const Tensor& b);
float max_abs(Context& ctx, const Tensor& x);
void row_norms(Context& ctx, const RowNorms& args);
void col_norms(Context& ctx, const ColNorms& args);
void scale_rows(Context& ctx, const ScaleRows& args);
void scale_cols(Context& ctx, const ScaleCols& args);
}  // namespace cpu
namespace gpu {
double sum_of_squares(Context& ctx, const Tensor& x);
double dot(Context& ctx, const Tensor& a, const Tensor& b);
float max_abs(Context& ctx, const Tensor& x);
void row_norms(Context& ctx, const RowNorms& args);
void col_norms(Context& ctx, const ColNorms& args);
void scale_rows(Context& ctx, const ScaleRows& args);
void scale_cols(Context& ctx, const ScaleCols& args);
}  // namespace gpu

/// Sum of x^2 over all elements; the square of the Frobenius norm.
inline double sum_of_squares(Context& ctx, const Tensor& x) {
  ON_DEVICE(sum_of_squares, ctx, x);
}

/// Sum of a b over all elements; <A, B> of the paper.
inline double dot(Context& ctx, const Tensor& a, const Tensor& b) {
  expect_shape(b, a.shape, "dot: b");
  ON_DEVICE(dot, ctx, a, b);
}

/// Largest |x|; 0 for an empty tensor, NaN when any element is.
inline float max_abs(Context& ctx, const Tensor& x) {
  ON_DEVICE(max_abs, ctx, x);
}

inline void row_norms(Context& ctx, const RowNorms& args) {
  expect_shape(args.norms, {args.x.rows()}, "row_norms: norms");
  ON_DEVICE(row_norms, ctx, args);
}

inline void col_norms(Context& ctx, const ColNorms& args) {
  expect_shape(args.norms, {args.x.cols()}, "col_norms: norms");
  ON_DEVICE(col_norms, ctx, args);
}

inline void scale_rows(Context& ctx, const ScaleRows& args) {
  expect_shape(args.y, args.x.shape, "scale_rows: y");
  expect_shape(args.scales, {args.x.rows()}, "scale_rows: scales");
  ON_DEVICE(scale_rows, ctx, args);
}

inline void scale_cols(Context& ctx, const ScaleCols& args) {
  expect_shape(args.y, args.x.shape, "scale_cols: y");
  expect_shape(args.scales, {args.x.cols()}, "scale_cols: scales");
  ON_DEVICE(scale_cols, ctx, args);
}
