// The one routine of BLAS that we call: a product of float64 matrices, which oneDNN has not. float64 is for
// checking what float32 computes, so nobody waits for its speed.
#pragma once

#include <cstddef>
#include <cstdint>

// Fortran: every argument by address, matrices by columns, the lengths of character strings last.
extern "C" void dgemm_(const char* transpose_a, const char* transpose_b, const int* m, const int* n,
                       const int* k, const double* alpha, const double* a, const int* lda, const double* b,
                       const int* ldb, const double* beta, double* c, const int* ldc, size_t, size_t);

/// c = alpha op(a) op(b) + beta c, all row-major, with op(a) (M, K), op(b) (K, N), c (M, N); ld: elements
/// from one row to the next. With beta = 0 what c held is ignored. Arguments as dnnl_sgemm has them.
inline void blas_dgemm(char transpose_a, char transpose_b, int64_t M, int64_t N, int64_t K, double alpha,
                       const double* a, int64_t lda, const double* b, int64_t ldb, double beta, double* c,
                       int64_t ldc) {
  // By columns a row-major matrix is its transpose: c^T = op(b)^T op(a)^T.
  const auto rows = static_cast<int>(N), cols = static_cast<int>(M), inner = static_cast<int>(K);
  const auto of_a = static_cast<int>(lda), of_b = static_cast<int>(ldb), of_c = static_cast<int>(ldc);
  dgemm_(&transpose_b, &transpose_a, &rows, &cols, &inner, &alpha, b, &of_b, a, &of_a, &beta, c, &of_c, 1, 1);
}
