// Products of matrices that lie wherever they do, in as few batches as their places allow: weights, gradients
// and state of one shape lie in banks, one after the other, so that a list of them is one batch most of the
// time, and nobody needs to copy them together first.
//
//   c[i] = alpha op(a[i]) op(b[i]) + beta c[i]             op(x) is x, or x transposed
//
// As batched_matmul (model/kernels/matmul.h): dtypes, rounding, aliasing.
#pragma once

#include <span>
#include <vector>

#include "model/kernels/context.h"

struct Products {
  std::span<const Tensor> c, a, b;  // matrices; as many of each, of one shape each
  bool transpose_a = false;         // use a[i]^T
  bool transpose_b = false;         // use b[i]^T
  double alpha = 1;
  double beta = 0;  // of the old c; 0: it may hold anything
};
/// Throws ShapeError when the lists or the sizes do not fit.
void products(Context& ctx, const Products& args);

/// The matrices of a batch (N, rows, cols).
std::vector<Tensor> matrices_of(const Tensor& batch);
/// How many of these tensors, from the first on, lie one after the other: at least 1, of none 0.
size_t lie_together(std::span<const Tensor> tensors);
/// (N, ...) of tensors of one shape that lie one after the other; absent when they do not, or are none.
Tensor stacked(std::span<const Tensor> tensors);
