// Negative powers of symmetric positive semi-definite matrices, such as Shampoo's A^(-1/4):
//
//   X = (A + eps I)^power,   power < 0
//
// for every matrix of a batch, by one of two methods.
//
// eigen: A = V diag(v) V^T by LAPACK (eigen.h), X = V diag((max(v, floor) + eps)^power) V^T in float64. Any
// power. Runs on the host, so that a GPU waits; several matrices at once, each by a thread of its own. The
// floor is -v of the most negative eigenvalue, if there is one (it tells how far rounding has moved the small
// ones, which a small eps would blow up), and at least (8 u)^(-1/power) of the largest, u as below, so that
// the elements of X do not lie further apart than the dtype has digits: 1e-24 of it for f32 and power -1/4. A
// zero A needs eps. For singular A `pseudo` asks for the pseudo-inverse: eigenvalues up to cutoff times the
// largest give 0 instead, and a zero A gives zero. The cutoff tells an eigenvalue from rounding in A: 1e-12
// for f64; for f32 1e-6, as G G^T rounded to f32 has nothing to say below that, so singular values of G below
// 1e-3 of the largest count as zero.
//
// newton: coupled Newton for power = -1/p with p = 1 .. 8 (Higham, Functions of Matrices, chapter 7; Anil et
// al., arXiv 2002.09018). With z = (1 + p) / (2 ||A||_F), X = z^(1/p) I and M = z A, repeat
//
//   T = ((p + 1) I - M) / p,   X <- X T,   M <- T^p M
//
// M = X^p A all the time and M -> I, so X -> A^(-1/p). Made of matrix products alone: it only enqueues work
// on a GPU, unless `tolerance` asks it to stop early, which waits for a number at every step. A small
// eigenvalue m of M grows by (1 + 1/p)^p = 2 ... 2.7 a step until it is near 1, then its distance from 1 is
// squared at every step: it takes about
//
//   log(||A||_F / v) / (p log(1 + 1/p)) + 6 steps        for the eigenvalue v of A
//
// so 30 reach v = 1e-8 ||A||_F for p = 2 and 4 (1e-7 for p = 1). Eigenvalues that are not done by then end at
// a finite multiple of the start: up to (1 + 1/p)^steps z^(1/p).
//
// Rounding makes tiny eigenvalues negative, and M would run away from I along those. Hence a floor of d
// ||A||_F under all of them, besides eps, with d = u (1 + sqrt(n) / 4) and u = 1.2e-7 in f32, 2.2e-16 in f64.
// It also says what can be expected: the error of X is about d ||A||_F / (p v) of its largest element, v the
// smallest eigenvalue (an estimate, from how the floor moves v). In f32 with n = 512 that is 1e-4 at
// ||A||_F / v = 300 and 1e-2 at 3e4. Where the root multiplies a gradient that A was made of, which is small
// along the small eigenvalues, it matters less.
//
// Both: A and X may be the same memory. c A gives c^power X (without eps) down to ||A||_F = 1e-35 in f32. A
// NaN or infinity makes every element of its own X NaN. A zero A with eps = 0 gives zero by newton. X is
// exactly symmetric on the CPU. Deterministic for a given number of threads.
#pragma once

#include "model/kernels/context.h"

enum class RootMethod : uint8_t { eigen, newton };

struct InverseRoot {
  Tensor x;      // (batch, n, n), written; f32 or f64, may be a
  Tensor a;      // (batch, n, n), symmetric (to rounding) positive semi-definite; dtype of x
  double power;  // negative: -0.25
  RootMethod method = RootMethod::eigen;
  double eps = 0;        // added to the diagonal
  bool pseudo = false;   // eigen: zero eigenvalues give 0
  double cutoff = 0;     // pseudo: what counts as zero, relative to the largest eigenvalue; 0: by dtype
  int steps = 30;        // newton: at most 100
  double tolerance = 0;  // newton: stop when max |M - I| is below it for the whole batch; 0: never
};

/// Writes X. Returns the number of Newton steps that were taken, the most of any part of the batch.
int inverse_root(Context& ctx, const InverseRoot& args);

/// p when power is -1/p with p = 1 .. 8, which is what newton can do; else 0.
int newton_order(double power);

/// Scratch of inverse_root() for a batch of this shape and dtype.
int64_t inverse_root_scratch_bytes(const Context& ctx, const Shape& shape, DType dtype, RootMethod method);
