// Polar factors. For X = U S V^T the polar factor is U V^T: X with all its singular values set to 1, the dual
// vector of the spectral norm and the semi-orthogonal matrix closest to X (Propositions 4 and 5 of arXiv
// 2409.20325).
//
// polar_method.h lists the ways to it, their names and their limits. Newton-Schulz repeats
//
// clang-format off
//   A = X X^T,   X <- a X + (b A + c A^2) X          on the smaller side: X^T X from the right when rows > cols
// clang-format on
//
// after a division by safety ||X||_F + eps. This applies p(x) = a x + b x^3 + c x^5 to every singular value
// and leaves U and V alone. For clearly rectangular matrices the same polynomial runs on the small Gram
// matrix ("Gram Newton-Schulz"):
//
//   R = X X^T, Q = I;   Z = a I + b R + c R^2,  Q <- Z Q,  R <- R Z^2;   at the end X <- Q X
//
// where everything but the first and the last product is small and symmetric. Rounding grows faster there, so
// X and R are formed anew after a few steps: see gram_runs in polar.cpp.
//
// Matrices are f32 or f64, or on a GPU bf16 with sums in f32, as Muon's author runs it: the polynomials bear
// that, but not the Gram matrix, so bf16 takes the plain iteration, three products a step and nothing between
// them.
//
// Every matrix of a batch is treated alone: the others never enter its result; the size of the batch can, by
// rounding, because products are cut among threads by it. Zero gives zero, a NaN spreads over its whole
// matrix. Without eps, c X gives the same as X for c > 0. X^T gives the transpose, but with AOL on a square
// X. Deterministic for a given number of threads. On a GPU only svd and sketch wait.
#pragma once

#include "model/kernels/context.h"
#include "optim/polar_method.h"

struct Polar {
  Tensor x;  // (batch, rows, cols), replaced by the polar factors; bf16 where the method bears it
  const PolarMethod& method;
  bool normalize = true;  // false: Newton-Schulz starts from x as it is, which must lie where it converges
};

/// Replaces every matrix of the batch by its polar factor.
void polar(Context& ctx, const Polar& args);
/// Scratch of polar() for a batch of this shape and dtype.
int64_t polar_scratch_bytes(const Context& ctx, const Shape& shape, DType dtype, const PolarMethod& method);
