// The largest and the smallest singular value of a matrix from some products with vectors: what an SVD says
// at a small part of its price, for matrices where the telemetry could not afford one.
//
// Golub-Kahan-Lanczos bidiagonalisation. From a unit vector v_1 of the smaller side's length,
//
//   alpha_k u_k = A v_k - beta_{k-1} u_{k-1},   beta_k v_{k+1} = A^T u_k - alpha_k v_k
//
// so that A V = U B with B upper bidiagonal (alpha on its diagonal, beta beside it). The singular values of B
// lie inside those of A: its largest is a lower estimate of A's largest, its smallest, min ||A v|| over a
// subspace, an upper estimate of A's smallest. The largest is within 1e-3 for random matrices after 32 steps,
// much closer where singular values are spread; the smallest is close where all are, as after Newton-Schulz,
// and far too high where A is singular and large. With min(rows, cols) steps both are exact to rounding.
//
// Every new vector is orthogonalised twice against all before it. The start is drawn from a fixed seed, so
// results are the same every time. Products and vectors are f32, where ctx computes (on a GPU this waits for
// two numbers a step); norms are float64. Zero gives zero, a NaN anywhere gives NaN.
//
// Source: G. Golub, W. Kahan, Calculating the singular values and pseudo-inverse of a matrix, 1965.
#pragma once

#include "model/kernels/context.h"

/// Singular values lie in [low, high].
struct SingularBand {
  double low = 0, high = 0;
};

/// The estimate for one matrix `a` (rows, cols), f32, from at most `steps` steps: two products each.
SingularBand lanczos_band(Context& ctx, const Tensor& a, int steps = 32);
/// Scratch of lanczos_band().
int64_t lanczos_scratch_bytes(int64_t rows, int64_t cols, int steps = 32);
