#include "optim/eigen.h"

#include <stdexcept>

#include "model/kernels/blas.h"

// Fortran: every argument by address, matrices by columns, the length of character strings last.
extern "C" {
void dsyevd_(const char* job, const char* triangle, const int* n, double* a, const int* lda, double* w,
             double* work, const int* lwork, int* iwork, const int* liwork, int* info, size_t job_length,
             size_t triangle_length);
void dgelqt_(const int* m, const int* n, const int* block, double* a, const int* lda, double* t,
             const int* ldt, double* work, int* info);
void dtrmm_(const char* side, const char* triangle, const char* transpose, const char* diagonal, const int* m,
            const int* n, const double* alpha, const double* a, const int* lda, double* b, const int* ldb,
            size_t side_length, size_t triangle_length, size_t transpose_length, size_t diagonal_length);
void dlarfb_(const char* side, const char* transpose, const char* direction, const char* stored, const int* m,
             const int* n, const int* k, const double* v, const int* ldv, const double* t, const int* ldt,
             double* c, const int* ldc, double* work, const int* ldwork, size_t side_length,
             size_t transpose_length, size_t direction_length, size_t stored_length);
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

/// Reflections of a block of qr: a panel and its T stay in a core's cache. Thin matrices, of which a block is
/// the better part, lose less time in the vectors of its recursion when it is small: the reflections of (384,
/// 96) take 0.57 ms by 32, 0.9 by 96, where soap's square ones are no faster by 32 (dev/results/rules.md).
int64_t reflections_of(int64_t r) {
  return std::min<int64_t>(r, r <= 128 ? 32 : 96);
}

/// Working memory of qr: the reflections and Q (m, r) each; T and dlarfb's, a block by r each; a block's
/// square.
int64_t qr_doubles(int64_t m, int64_t r) {
  const int64_t block = reflections_of(r);
  return 2 * m * r + 2 * block * r + block * block;
}
}  // namespace

// Row-major or by columns is the same for a symmetric matrix. LAPACK leaves eigenvector k in its column k,
// which is our row k.
HostEigen host_eigen(HostRoom& room, const Tensor& a) {
  const int64_t N = a.shape[0];
  const int n = static_cast<int>(N);
  const WorkSizes size = eigen_work(n);
  const HostEigen eigen{.values = room.doubles(N), .vectors = room.doubles(N * N), .finite = true};
  double* work = room.doubles(size.doubles);
  int* iwork = room.ints(size.ints);
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
  const HostMemory memory(ctx, host_eigen_doubles(n));
  HostRoom room = memory.room(0, host_eigen_doubles(n));
  const HostEigen eigen = host_eigen(room, *OnHost(ctx, args.a));
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
//
// dgelqt leaves L, the reflections V (r, m) with a unit upper triangle in front, and an upper triangle T for
// each block of them. With H = I - V^T T V of a block, Q' = [I 0] H_last^T .. H_first^T; each touches only
// what lies right of and below its own place, and its own rows, [I 0] until then, become [I 0] - (T V1)^T V
// with V1 the block's triangle. A block halves its rows again and again, so that nearly all is matrix
// products; dgelqf and dorglq go row by row below r = 128, ten times slower.
namespace {
/// One matrix in memory of the host.
void host_qr(HostRoom& room, const Tensor& q, const Tensor& x) {
  const int64_t M = x.shape[0], R = x.shape[1];
  const int m = static_cast<int>(M), r = static_cast<int>(R);
  const int64_t most = reflections_of(R);
  const int block = static_cast<int>(most);
  double* const v = room.doubles(M * R);
  double* const rows = room.doubles(M * R);
  double* const t = room.doubles(most * R);
  double* const work = room.doubles(most * R);
  double* const tv = room.doubles(most * most);
  if (!load_doubles(v, x)) return store_nan(q);
  const double minus = -1;
  int info = 0;
  dgelqt_(&r, &m, &block, v, &r, t, &block, work, &info);
  std::fill_n(rows, M * R, 0.0);
  for (int64_t first = (R - 1) / most * most; first >= 0; first -= most) {
    const int64_t K = std::min(most, R - first), corner = first * R + first;
    const int k = static_cast<int>(K), below = static_cast<int>(R - first - K),
              right = static_cast<int>(M - first);
    if (below > 0)
      dlarfb_("R", "T", "F", "R", &below, &right, &k, v + corner, &r, t + first * most, &block,
              rows + corner + K, &r, work, &below, 1, 1, 1, 1);
    for (int64_t j = 0; j < K; ++j)  // what stands in the place of V's zeros and ones is L
      for (int64_t i = j; i < K; ++i) v[corner + j * R + i] = i == j ? 1 : 0;
    for (int64_t j = 0; j < K; ++j) std::copy_n(v + corner + j * R, K, tv + j * K);
    dtrmm_("L", "U", "N", "N", &k, &k, &minus, t + first * most, &block, tv, &k, 1, 1, 1, 1);
    blas_dgemm('N', 'T', right, K, K, 1, v + corner, R, tv, K, 0, rows + corner, R);
    for (int64_t i = 0; i < K; ++i) rows[corner + i * R + i] += 1;
  }
  store_doubles(q, [&](int64_t i) { return rows[i]; });
}
}  // namespace

void qr(Context& ctx, std::span<const Qr> list) {
  if (list.empty()) return;
  const Shape shape = list[0].x.shape;
  expect(shape.rank() == 2 && shape[0] >= shape[1], "qr: x must have at least as many rows as columns");
  Work sum;
  for (const Qr& one : list) {
    expect_shape(one.x, shape, "qr: x");
    expect_shape(one.q, shape, "qr: q");
    sum.flops += work(one).flops;
  }
  const OpTimer timer(ctx, "qr", sum);
  std::vector<OnHost> from, to;
  for (const Qr& one : list) from.emplace_back(ctx, one.x), to.emplace_back(ctx, one.q, /*load=*/false);
  side_by_side(ctx, std::ssize(list), qr_doubles(shape[0], shape[1]), [&](int64_t i, HostRoom& room) {
    const auto k = static_cast<size_t>(i);
    host_qr(room, *to[k], *from[k]);
  });
  for (OnHost& q : to) q.store();
}

int64_t host_eigen_doubles(int64_t n) {
  const WorkSizes size = eigen_work(static_cast<int>(n));
  return n + n * n + size.doubles + size.ints;
}

int64_t symmetric_eigen_scratch_bytes(const Context& ctx, int64_t n) {
  if (ctx.where == Where::gpu) return 0;
  return host_eigen_doubles(n) * 8;
}

int64_t qr_scratch_bytes(const Context& ctx, int64_t m, int64_t r, int64_t count) {
  return side_by_side_bytes(ctx, count, qr_doubles(m, r));
}
