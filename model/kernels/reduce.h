// Sums, norms and scalings of whole tensors, rows and columns. The optimizer's norms are made of these.
//
// Whole tensors (any shape), returned:   sum_of_squares = sum x^2      dot = sum a b
//                                        sum_abs = sum |x|             max_abs = max |x|
// Whole tensors, left where ctx computes:
//                                        sums_of_squares  sums[i] = sum of tensors[i]^2
//                                        mean       out = scale (sum x) / N, or out += that
// Matrices (rows, cols):                 row_norms  norms[r] = sqrt(sum over c of x[r][c]^2)
//                                        col_norms  norms[c] = sqrt(sum over r of x[r][c]^2)
//                                        scale_rows y[r][c] = factor x[r][c] s[r]     or / s[r];  times t[r]
//                                        scale_cols y[r][c] = factor x[r][c] s[c]     or / s[c]
//
// Those that return a number wait for it; the others only enqueue work on a GPU. Sums are float64 inside, so
// squares of float32 neither overflow nor vanish. A NaN or infinity anywhere in the input makes the result
// non-finite. Deterministic for any number of threads: sums run over chunks whose bounds depend on the size
// alone, and the chunks' sums are added in order. dtype float32, or but for mean float64: then all tensors of
// a call, norms and scales included, and squares may overflow from 1e154 on. On a GPU x, y, a and b may be
// bf16 (not the tensors of sums_of_squares and mean), with norms and scales in float32.
//
// On a GPU sums take scratch: whole_scratch_bytes() for those that return a number, and what the functions
// below say. On the CPU only col_norms does.
#pragma once

#include <span>

#include "model/kernels/context.h"

struct SumsOfSquares {
  Tensor sums;                      // (number of tensors) f64, written
  std::span<const Tensor> tensors;  // of any shapes, all f32 or all f64
};

struct Mean {
  Tensor out;               // (1) f64
  Tensor x;                 // (N), up to some hundred thousand: one block adds them up
  double scale = 1;         // of the mean
  bool accumulate = false;  // out += instead of =
};

struct RowNorms {
  Tensor norms;  // (rows), written: Euclidean; f64 when x is, else f32
  Tensor x;      // (rows, cols)
};

struct ColNorms {
  Tensor norms;  // (cols), written: Euclidean; f64 when x is, else f32
  Tensor x;      // (rows, cols)
};

struct ScaleRows {
  Tensor y;             // (rows, cols), written, dtype of x; may be x
  Tensor x;             // (rows, cols)
  Tensor scales;        // (rows); f64 when x is, else f32
  double factor = 1;    // of everything
  bool divide = false;  // divide by the scales; where a scale is 0 the result is 0
  Tensor times = {};    // (rows), as scales: multiplied by these, too, at the end; absent: not
};

struct ScaleCols {
  Tensor y;             // (rows, cols), written, dtype of x; may be x
  Tensor x;             // (rows, cols)
  Tensor scales;        // (cols); f64 when x is, else f32
  double factor = 1;    // of everything
  bool divide = false;  // divide by the scales; where a scale is 0 the result is 0
};

/// Scratch of the functions that return a number.
constexpr int64_t whole_scratch_bytes() {
  return 4096;
}
/// Scratch of sums_of_squares for tensors of these sizes: float64 sums of chunks.
int64_t sums_of_squares_scratch_bytes(std::span<const Tensor> tensors);
/// Scratch of row_norms and col_norms: float64 sums of parts of rows or columns.
int64_t row_norms_scratch_bytes(int64_t rows, int64_t cols);
int64_t col_norms_scratch_bytes(int64_t rows, int64_t cols);

/// Every input read once, every tensor-sized output written once.
inline Work work(const Tensor& x) {
  return {.bytes = 1.0 * x.bytes()};
}
inline Work work(const Tensor& a, const Tensor& b) {
  return {.bytes = 1.0 * (a.bytes() + b.bytes())};
}
inline Work work(const SumsOfSquares& args) {
  Work sum;
  for (const Tensor& x : args.tensors) sum.bytes += static_cast<double>(x.bytes());
  return sum;
}
inline Work work(const Mean& args) {
  return work(args.x);
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
double sum_abs(Context& ctx, const Tensor& x);
double max_abs(Context& ctx, const Tensor& x);
void sums_of_squares(Context& ctx, const SumsOfSquares& args);
void mean(Context& ctx, const Mean& args);
void row_norms(Context& ctx, const RowNorms& args);
void col_norms(Context& ctx, const ColNorms& args);
void scale_rows(Context& ctx, const ScaleRows& args);
void scale_cols(Context& ctx, const ScaleCols& args);
}  // namespace cpu
namespace gpu {
double sum_of_squares(Context& ctx, const Tensor& x);
double dot(Context& ctx, const Tensor& a, const Tensor& b);
double sum_abs(Context& ctx, const Tensor& x);
double max_abs(Context& ctx, const Tensor& x);
void sums_of_squares(Context& ctx, const SumsOfSquares& args);
void mean(Context& ctx, const Mean& args);
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

/// Sum of |x| over all elements: the dual of the l1->linf norm.
inline double sum_abs(Context& ctx, const Tensor& x) {
  ON_DEVICE(sum_abs, ctx, x);
}

/// Largest |x|; 0 for an empty tensor, NaN when any element is.
inline double max_abs(Context& ctx, const Tensor& x) {
  ON_DEVICE(max_abs, ctx, x);
}

inline void sums_of_squares(Context& ctx, const SumsOfSquares& args) {
  expect_shape(args.sums, {static_cast<int64_t>(args.tensors.size())}, "sums_of_squares: sums");
  ON_DEVICE(sums_of_squares, ctx, args);
}

inline void mean(Context& ctx, const Mean& args) {
  expect_shape(args.out, {1}, "mean: out");
  expect(args.x.size() > 0, "mean: x is empty");
  ON_DEVICE(mean, ctx, args);
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
  if (args.times) expect_shape(args.times, {args.x.rows()}, "scale_rows: times");
  ON_DEVICE(scale_rows, ctx, args);
}

inline void scale_cols(Context& ctx, const ScaleCols& args) {
  expect_shape(args.y, args.x.shape, "scale_cols: y");
  expect_shape(args.scales, {args.x.cols()}, "scale_cols: scales");
  ON_DEVICE(scale_cols, ctx, args);
}
