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
// Express are fast and stop near 1 (see polar_schedules). For clearly rectangular matrices the same
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

#include "model/kernels/context.h"

enum class PolarMethod : uint8_t { svd, keller5, polar_express, cubic, quintic12, hybrid, modula6 };

/// One step: x <- a x + b x^3 + c x^5 on singular values.
struct Quintic {
  double a, b, c;
};

/// One row of the table of methods.
struct PolarSchedule {
  const char* name;                // what users write: "keller5"
  std::span<const Quintic> steps;  // the last one repeats when more are asked for; empty for svd
  int default_steps;               // 0 for svd
  double safety = 1;               // divides by safety * ||X||_F

  const Quintic& at(int step) const;
};
/// In the order of PolarMethod.
std::span<const PolarSchedule> polar_schedules();
const PolarSchedule& polar_schedule(PolarMethod method);
/// Names for the command line, in the order of PolarMethod.
std::span<const char* const> polar_names();

struct Polar {
  Tensor x;  // (batch, rows, cols), replaced by the polar factors; f32 for svd
  PolarMethod method;
  int steps = 0;  // 0: the method's own number
};

/// Replaces every matrix of the batch by its polar factor.
void polar(Context& ctx, const Polar& args);
/// Scratch of polar() for a batch of this shape and dtype.
int64_t polar_scratch_bytes(const Context& ctx, const Shape& shape, DType dtype, PolarMethod method,
                            int steps = 0);
