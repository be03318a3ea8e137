// Exact singular values and polar factors by LAPACK's dgesdd, in float64. The oracle of the faster methods,
// and what `ns=svd` uses. One matrix at a time; CPU only (a GPU build copies the matrix over: it is the slow,
// exact way).
//
// For W = U S V^T with singular values S_1 >= ... >= S_r, r = min(rows, cols):
//   singular_values   S
//   svd_polar         x <- U_k V_k^T of the k largest singular values: all of them, or `rank`. Of these only
//                     S_i > cutoff S_1: zero singular directions stay zero (Proposition 5 lets any
//                     completion; this one is what Newton-Schulz gives, too). Among equal values LAPACK's
//                     order decides which are the k largest
//
// Zero gives zero. A NaN or infinity anywhere makes every result NaN. Relative accuracy 1e-15 of S_1.
#pragma once

#include <span>

#include "model/kernels/context.h"

/// Scratch of one call for a (rows, cols) matrix; none on a GPU.
int64_t svd_scratch_bytes(const Context& ctx, int64_t rows, int64_t cols);

/// `w` (rows, cols), f32 or f64; `values` has min(rows, cols) entries, largest first.
void singular_values(Context& ctx, const Tensor& w, std::span<double> values);
struct SvdPolar {
  int64_t rank = 0;   // at most this many directions; 0: all
  double cutoff = 0;  // of the largest singular value; 0: 1e-6 for f32, where the rounding of the elements is
                      // about as large, and 1e-10 for f64
};
/// Replaces `x` (rows, cols), f32 or f64, by its polar factor; returns the sum of all singular values.
double svd_polar(Context& ctx, const Tensor& x, const SvdPolar& how = {});
