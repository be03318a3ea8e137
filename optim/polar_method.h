// Ways to a polar factor, by name: which polynomials Newton-Schulz runs, and the methods beside it. polar.h
// runs them; polar_band.h says how close to 1 a polynomial brings singular values.
//
// Newton-Schulz divides X by (safety ||X||_F + eps), so that singular values lie in (0, 1], and then applies
// p(x) = a x + b x^3 + c x^5 to each of them, a step at a time. The methods differ in (a, b, c) per step:
//
// clang-format off
//   name            steps  what it is
//   keller5             5  (3.4445, -4.7750, 2.0315): steep, ends anywhere in 0.68 .. 1.2
//   polar-express       5  the best that five steps can do from 1e-3 on; X / (1.02 ||X||_F)
//   polar-express8      8  the same for eight; ends with (15/8, -10/8, 3/8), which converges
//   cans5               5  odd polynomials of Chebyshev's kind; X / (1.01 ||X||_F), see below
//   you5                5  J. You's schedule
//   modula6             6  coefficients in 1024ths
//   aol4                4  short, for the AOL scaling below
//   cubic5              5  cubic steps, c = 0: two products a step instead of three
//   hybrid             10  eight of Keller's steps, then two of (2, -1.5, 0.5)
//   quintic12          12  (2, -1.5, 0.5): converges
//   quintic            15  (3, -16/5, 6/5): converges, in the end by a factor 0.6 a step
//   cubic              20  (3/2, -1/2), Newton-Schulz itself: converges
//   svd                 -  exact, by LAPACK on the host (svd.h)
//   newton             30  X (X^T X)^(-1/2) by coupled Newton (inverse_root.h)
//   sketch[:rank=K]     -  randomised SVD on the host: U_K V_K^T only; by default K = min(rows, cols)
// clang-format on
//
// Sources: Newton-Schulz: Higham, Functions of Matrices, eq. 5.22. keller5: K. Jordan, "Muon". polar-express:
// Amsel et al., arXiv 2505.16932. cans5: Grishina et al., arXiv 2506.10935. modula6: Bernstein, documentation
// of modula. quintic12: the optimization benchmark of modded-nanogpt.
//
// More steps than a set has repeat its last one, fewer leave out the last ones. A user's own coefficients:
// "3.4445:-4.775:2.0315", repeated "8x3.4445:-4.775:2.0315", in sequence
// "8x3.4445:-4.775:2.0315+2x2:-1.5:0.5"; two numbers are a cubic step.
//
// Where polynomials converge. The cubic step takes (0, sqrt 3) to 1. It takes (sqrt 3, 2] to -1, the wrong
// sign, without a word; sqrt 5 is the edge of a cycle, and beyond it values run away. Convergent quintics
// have such edges, too. In here nothing gets there: after the division singular values lie in (0, 1]. A
// schedule that takes some x in (0, 1] below 0 or beyond 1.7, or whose slope at 0 is not positive, is
// refused.
//
// The first polynomials of the optimal schedules are steep at the upper end, too: four of cans5 in a row
// multiply a change of x near 1 by 1e5, and X of rank one has x = 1, give or take its rounding. Safeties keep
// away from there; that of cans5 is ours.
//
// AOL (almost-orthogonal scaling, Prach & Lampert, arXiv 2208.03160): for the Gram matrix A = X X^T of the
// smaller side (of the rows, when X is square), X <- diag(s) X / 1.17 with s_i = 1 / sqrt(sum_j |A_ij|), the
// columns of a tall X likewise. Then ||X||_2 <= 1 / 1.17: diag(s) A diag(s) is similar to diag(s)^2 A, whose
// absolute row sums are 1. Singular values are larger than after a division by ||X||_F alone, so fewer steps
// do. Price: the result is the polar factor of diag(s) X. That is the one of X when the rows are orthogonal,
// close to it when they nearly are, and something else when they are not. 1.17 is ours: the first polynomial
// is negative from 0.884 on, so that without it orthogonal rows would come out with the wrong sign.
//
// newton squares X / ||X||_F and adds d to the eigenvalues, 2e-6 in f32 and 4e-15 in f64, so small directions
// do not reach 1: x becomes x / sqrt(x^2 + d), 0.7 at x = 1.4e-3 in f32. 30 steps reach down to x = 1e-4.
// Zero directions of a rank-deficient X stay near zero: rounding in them is multiplied by up to 1 / sqrt(d).
// Needs f32 at least.
//
// sketch: Y = G Omega with a Gaussian Omega of K + 8 columns from a fixed seed; twice Y <- G qr(G^T qr(Y));
// Q = qr(Y), and the SVD of Q^T G. Exact up to rounding when K + 8 >= min(rows, cols). In f32, singular
// values below 1e-6 of the largest count as 0.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

/// One step: x <- a x + b x^3 + c x^5 on singular values.
struct Quintic {
  double a, b, c;
  double operator()(double x) const { return x * (a + x * x * (b + x * x * c)); }
};

/// How to compute polar factors, chosen once.
struct PolarMethod {
  enum class Kind : uint8_t { svd, newton_schulz, newton, sketch };
  std::string name;  // as the user wrote it
  Kind kind = Kind::svd;
  std::vector<Quintic> steps = {};  // of Newton-Schulz, one for each iteration
  int newton_steps = 30;            // of newton
  int64_t rank = 0;                 // of sketch; 0: min(rows, cols)
  double safety = 1;                // X is divided by safety ||X||_F + eps first; not for svd
  double eps = 0;                   // PyTorch's Muon has 1e-7. 0: c X gives what X gives, however small
  bool aol = false;                 // and is scaled as above then

  /// True when polar() computes on the host, so that a GPU waits for it.
  bool on_host() const { return kind == Kind::svd || kind == Kind::sketch; }
  /// True when bf16 matrices are good enough.
  bool bears_bf16() const { return kind == Kind::newton_schulz; }
  /// Floating-point operations for a matrix of these sides, n the smaller and m the larger one:
  ///   Newton-Schulz  4 n^2 m + 2 n^3 a step, 4 n^2 m a cubic one, as if it always ran on X itself
  ///   newton         4 n^2 m + 6 n^3 a step
  ///   svd            8 n^2 m + 20 n^3, an estimate for LAPACK's divide and conquer
  ///   sketch         14 n m k + 20 k^3 for k = rank + 8 columns, an estimate
  double flops(int64_t rows, int64_t cols) const;
  /// What the steps make of a singular value x of the matrix that they start from.
  double apply(double x) const;
};

/// One row of the table of methods.
struct PolarRow {
  const char* name;                // what users write: "keller5"
  PolarMethod::Kind kind;          //
  std::span<const Quintic> steps;  // of Newton-Schulz; the last one repeats when more are asked for
  int default_steps;               // 0 where there are none
  double safety = 1;
  bool aol = false;
};
std::span<const PolarRow> polar_rows();
/// Names for the command line, in the order of polar_rows().
std::span<const char* const> polar_names();

/// The method of a name in the table, or of coefficients, with `steps` iterations (0: its own number).
/// UsageError, naming `option`, for an unknown name, a number of steps that means nothing, and coefficients
/// that are refused.
PolarMethod polar_method(const std::string& text, int steps = 0, const std::string& option = "ns");
