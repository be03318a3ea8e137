#include "optim/eigen.h"

#include <stdexcept>

// Fortran: every argument by address, matrices by columns, the length of character strings last.
extern "C" {
void dsyevd_(const char* job, const char* triangle, const int* n, double* a, const int* lda, double* w,
             double* work, const int* lwork, int* iwork, const int* liwork, int* info, size_t job_length,
             size_t triangle_length);
void dgelqf_(const int* m, const int* n, double* a, const int* lda, double* tau, double* work,
             const int* lwork, int* info);
void dorglq_(const int* m, const int* n, const int* k, double* a, const int* lda, const double* tau,
             double* work, const int* lwork, int* info);
}

namespace {
constexpr int kQuery = -1;

struct WorkSizes {
  int doubles, ints;
};

WorkSizes eigen_work(int n) {
  double doubles = 0, dummy = 0;
  int ints = 0, info = 0;
  dsyevd_("V", "L", &n, &dummy, &n, &dummy, &doubles, &kQuery, &ints, &kQuery, &info, 1, 1);
  return {static_cast<int>(doubles) + 1, ints};
}

/// For a matrix of r rows and m columns in LAPACK's eyes.
int lq_work(int r, int m) {
  double factor = 0, form = 0, dummy = 0;
  int info = 0;
  dgelqf_(&r, &m, &dummy, &r, &dummy, &factor, &kQuery, &info);
  dorglq_(&r, &m, &r, &dummy, &r, &dummy, &form, &kQuery, &info);
  return static_cast<int>(std::max(factor, form)) + 1;
}
}  // namespace

// Row-major or by columns is the same for a symmetric matrix. LAPACK leaves eigenvector k in its column k,
// which is our row k.
HostEigen host_eigen(HostMemory& memory, const Tensor& a) {
  const int64_t N = a.shape[0];
  const int n = static_cast<int>(N);
  const WorkSizes size = eigen_work(n);
  const HostEigen eigen{.values = memory.doubles(N), .vectors = memory.doubles(N * N), .finite = true};
  double* work = memory.doubles(size.doubles);
  int* iwork = memory.ints(size.ints);
  if (!load_doubles(eigen.vectors, a)) return {eigen.values, eigen.vectors, false};
  for (int64_t i = 0; i < N; ++i)
    for (int64_t j = 0; j < i; ++j) {
      double &x = eigen.vectors[i * N + j], &y = eigen.vectors[j * N + i];
      x = y = x / 2 + y / 2;
    }
  int info = 0;
  dsyevd_("V", "L", &n, eigen.vectors, &n, eigen.values, work, &size.doubles, iwork, &size.ints, &info, 1, 1);
  if (info != 0) throw std::logic_error("dsyevd: no convergence");
  return eigen;
}

void symmetric_eigen(Context& ctx, const SymmetricEigen& args) {
  const int64_t n = args.a.shape[0];
  expect_shape(args.a, {n, n}, "symmetric_eigen: a");
  expect_shape(args.vectors, {n, n}, "symmetric_eigen: vectors");
  expect_shape(args.values, {n}, "symmetric_eigen: values");
  const OpTimer timer(ctx, "symmetric_eigen", work(args));
  OnHost values(ctx, args.values, /*load=*/false), vectors(ctx, args.vectors, /*load=*/false);
  HostMemory memory(ctx);
  const HostEigen eigen = host_eigen(memory, *OnHost(ctx, args.a));
  if (eigen.finite) {
    store_doubles(*values, [&](int64_t i) { return eigen.values[i]; });
    store_doubles(*vectors, [&](int64_t i) { return eigen.vectors[i % n * n + i / n]; });
  } else {
    store_nan(*values);
    store_nan(*vectors);
  }
  values.store();
  vectors.store();
}

// LAPACK reads our row-major X (m, r) as X^T by columns. Its LQ factors X^T = L Q' are ours transposed: X =
// Q'^T L^T with Q = Q'^T and R = L^T, by the same reflections that dgeqrf makes of X. We read Q' back the
// same way and never transpose.
void qr(Context& ctx, const Qr& args) {
  const int64_t M = args.x.shape[0], R = args.x.shape[1];
  expect(args.x.shape.rank() == 2 && M >= R, "qr: x must have at least as many rows as columns");
  expect_shape(args.q, args.x.shape, "qr: q");
  const OpTimer timer(ctx, "qr", work(args));
  const int m = static_cast<int>(M), r = static_cast<int>(R), lwork = lq_work(r, m);
  OnHost q(ctx, args.q, /*load=*/false);
  HostMemory memory(ctx);
  double* a = memory.doubles(M * R);
  double* tau = memory.doubles(R);
  double* work = memory.doubles(lwork);
  if (load_doubles(a, *OnHost(ctx, args.x))) {
    int info = 0;
    dgelqf_(&r, &m, a, &r, tau, work, &lwork, &info);
    dorglq_(&r, &m, &r, a, &r, tau, work, &lwork, &info);
    store_doubles(*q, [&](int64_t i) { return a[i]; });
  } else {
    store_nan(*q);
  }
  q.store();
}

int64_t symmetric_eigen_scratch_bytes(const Context& ctx, int64_t n) {
  if (ctx.where == Where::gpu) return 0;
  const WorkSizes size = eigen_work(static_cast<int>(n));
  return (n + n * n + size.doubles + size.ints) * 8;
}

int64_t qr_scratch_bytes(const Context& ctx, int64_t m, int64_t r) {
  if (ctx.where == Where::gpu) return 0;
  return (m * r + r + lq_work(static_cast<int>(r), static_cast<int>(m))) * 8;
}
