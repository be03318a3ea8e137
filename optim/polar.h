// Polar factors. For X = U S V^T the polar factor is U V^T: X with all its singular values set to 1, the dual
// vector of the spectral norm and the semi-orthogonal matrix closest to X (Propositions 4 and 5 of arXiv
// 2409.20325).
//
// Newton-Schulz: divide X by (safety ||X||_F), so that singular values lie in (0, 1]; then repeat
//
//   A = X X^T,   X <- a X + (b A + c A^2) X          on the smaller side: X^T X from the right when rows >
//   cols
//
// which applies p(x) = a x + b x^3 + c x^5 to every singular value and leaves U and V alone. The methods
// differ in (a, b, c) per step. Cubic steps converge to 1 from anywhere in (0, sqrt 3); Keller's and Polar
// Express are fast and stop near 1 (see polar_rows). For clearly rectangular matrices the same
// polynomial runs on the small Gram matrix ("Gram Newton-Schulz"):
//
//   R = X X^T, Q = I;   Z = a I + b R + c R^2,  Q <- Z Q,  R <- R Z^2;   at the end X <- Q X
//
// where everything but the first and the last product is small and symmetric. Rounding grows faster there, so
// X and R are formed anew after a few steps: see gram_runs in polar.cpp.
//
// Matrices are f32, or on a GPU bf16 with sums in f32, as Muon's author runs it: the methods bear that, but
// not the Gram matrix, so bf16 takes the plain iteration, three products a step and nothing between them.
//
// Every matrix of a batch is treated alone: the others never enter its result; the size of the batch can, by
// rounding, because products are cut among threads by it. Zero gives zero, c X
// gives the same as X for c > 0 (no eps: a zero norm divides to zero), a NaN spreads over its whole matrix.
// Deterministic for a given number of threads. On a GPU only svd waits.
//
// Sources: Newton-Schulz: Higham, Functions of Matrices, eq. 5.22. keller5: K. Jordan, "Muon". polar-express:
// Amsel et al., arXiv 2505.16932. modula6: Bernstein, "Newton-Schulz" of the modula documentation. quintic12:
// the optimization benchmark of modded-nanogpt. hybrid: eight of Keller's steps and two convergent ones.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "model/kernels/context.h"

/// One step: x <- a x + b x^3 + c x^5 on singular values.
struct Quintic {
  double a, b, c;
};

/// One row of the table of methods.
struct PolarRow {
  const char* name;                // what users write: "keller5"
  std::span<const Quintic> steps;  // the last one repeats when more are asked for; empty for svd
  int default_steps;               // 0 for svd
  double safety = 1;               // divides by safety * ||X||_F
};
std::span<const PolarRow> polar_rows();
/// Names for the command line, in the order of polar_rows().
std::span<const char* const> polar_names();

/// How to compute polar factors, chosen once.
struct PolarMethod {
  enum class Kind : uint8_t { svd, newton_schulz };
  std::string name;  // as in the table
  Kind kind = Kind::svd;
  std::vector<Quintic> steps = {};  // of Newton-Schulz, one for each iteration
  double safety = 1;                // X is divided by safety ||X||_F first

  /// True when polar() computes on the host, so that a GPU waits for it.
  bool on_host() const { return kind == Kind::svd; }
  /// What the steps make of a singular value x of the normalised matrix.
  double apply(double x) const;
};
/// The method of a name in the table, with `steps` iterations (0: its own number). UsageError, naming
/// `option`, for an unknown name or a number of steps that means nothing.
PolarMethod polar_method(const std::string& text, int steps = 0, const std::string& option = "ns");

struct Polar {
  Tensor x;  // (batch, rows, cols), replaced by the polar factors; f32 for svd
  const PolarMethod& method;
};

/// Replaces every matrix of the batch by its polar factor.
void polar(Context& ctx, const Polar& args);
/// Scratch of polar() for a batch of this shape and dtype.
int64_t polar_scratch_bytes(const Context& ctx, const Shape& shape, DType dtype, const PolarMethod& method);
