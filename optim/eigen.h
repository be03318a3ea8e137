// Eigenvalues of symmetric matrices and orthonormal bases, by LAPACK in float64 on the host. A GPU build
// copies the matrix over and waits: it is the slow, exact way. f32 or f64.
//
//   symmetric_eigen   A = V diag(values) V^T,   V^T V = I,   values ascending     (dsyevd)
//   qr                X = Q R,   Q^T Q = I,   R upper triangular                  (Householder, dgelqt)
//
// symmetric_eigen reads (A + A^T) / 2, so an A that is symmetric up to rounding is good enough. Column k of
// `vectors` belongs to value k. Its sign, and the basis of equal values, are LAPACK's choice. Accuracy 1e-15
// of the largest |value|.
//
// qr returns Q (m, r) for X (m, r) with m >= r, in the sign convention of LAPACK's dgeqrf, which is numpy's:
// R[k][k] is not made positive (it has the opposite sign of the entry that column k has at k when its turn
// comes). Q always has orthonormal columns. Where column k of X depends on those before it, a column of zeros
// for instance, R[k][k] is 0 and column k of Q is a unit vector orthogonal to the others that X does not
// decide; for X = 0, Q is the first r columns of the identity.
//
// qr takes any number of matrices of one shape, several at once: each by one thread, so that a matrix has the
// same bits whatever it comes with. symmetric_eigen takes one matrix, and OpenBLAS all threads for it:
// deterministic for a given number of them.
//
// A NaN or infinity anywhere makes every result of its matrix NaN.
//
// FLOPs, for profiles (Golub & Van Loan, "Matrix Computations", chapters 5 and 8): eigenvalues and
// eigenvectors 4 2/3 n^3, of which 4/3 make the matrix tridiagonal, 4/3 are the most that divide and conquer
// takes, and 2 take the vectors back; qr 4 r^2 (m - r / 3), half of it for R and half for Q.
#pragma once

#include <span>

#include "model/kernels/context.h"
#include "optim/host_memory.h"

struct SymmetricEigen {
  Tensor values;   // (n), written; f32 or f64
  Tensor vectors;  // (n, n), written; may be a
  Tensor a;        // (n, n)
};
void symmetric_eigen(Context& ctx, const SymmetricEigen& args);

struct Qr {
  Tensor q;  // (m, r), written; may be x
  Tensor x;  // (m, r), m >= r
};
void qr(Context& ctx, std::span<const Qr> list);
inline void qr(Context& ctx, const Qr& args) {
  qr(ctx, std::span(&args, 1));
}

inline double eigen_flops(int64_t n) {
  const auto side = static_cast<double>(n);
  return 14.0 / 3 * side * side * side;
}
inline Work work(const SymmetricEigen& args) {
  return {.flops = eigen_flops(args.a.shape[0])};
}
inline Work work(const Qr& args) {
  const auto m = static_cast<double>(args.x.shape[0]), r = static_cast<double>(args.x.shape[1]);
  return {.flops = 4 * r * r * (m - r / 3)};
}

/// Scratch of one call, of qr for a list of so many; none on a GPU.
int64_t symmetric_eigen_scratch_bytes(const Context& ctx, int64_t n);
int64_t qr_scratch_bytes(const Context& ctx, int64_t m, int64_t r, int64_t count = 1);

/// Eigenvalues and eigenvectors in memory of the host, for what goes on computing there.
struct HostEigen {
  double* values;   // (n), ascending
  double* vectors;  // (n, n): eigenvector k is row k
  bool finite;      // false: a is not finite, and there are no values
};
/// Of `a` (n, n) in memory of the host. The result lives in `room`, of which it takes
/// host_eigen_doubles(n).
HostEigen host_eigen(HostRoom& room, const Tensor& a);
int64_t host_eigen_doubles(int64_t n);
