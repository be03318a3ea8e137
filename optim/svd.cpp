#include "optim/svd.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "optim/host_memory.h"

// Fortran: every argument by address, matrices by columns, the length of a character string last.
extern "C" void dgesdd_(const char* job, const int* m, const int* n, double* a, const int* lda, double* s,
                        double* u, const int* ldu, double* vt, const int* ldvt, double* work,
                        const int* lwork, int* iwork, int* info, size_t job_length);

namespace {
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// A = U S V^T of one matrix, in host memory. LAPACK reads our row-major (rows, cols) as the transpose,
/// (cols, rows) by columns, whose polar factor is the transpose of ours: we write it back the same way and
/// never transpose.
struct Decomposition {
  int m, n, r;  // of the matrix as LAPACK sees it: m = cols, n = rows, r = min
  bool vectors;
  double *a, *s, *u, *vt, *work;
  int* iwork;
  int lwork;

  static int work_size(int m, int n, bool vectors) {
    const int r = std::min(m, n), query = -1;
    int info = 0, ints = 0;
    double size = 0, dummy = 0;
    dgesdd_(vectors ? "S" : "N", &m, &n, &dummy, &m, &dummy, &dummy, &m, &dummy, &r, &size, &query, &ints,
            &info, 1);
    return static_cast<int>(size) + 1;
  }

  Decomposition(HostRoom room, const Tensor& w, bool with_vectors)
      : m(static_cast<int>(w.cols())),
        n(static_cast<int>(w.rows())),
        r(std::min(m, n)),
        vectors(with_vectors) {
    const int64_t M = m, N = n, R = r;
    lwork = work_size(m, n, vectors);
    a = room.doubles(M * N);
    s = room.doubles(R);
    u = room.doubles(vectors ? M * R : 1);
    vt = room.doubles(vectors ? R * N : 1);
    work = room.doubles(lwork);
    iwork = room.ints(8 * R);
  }

  /// False when the input is not finite.
  bool run(const Tensor& w) {
    if (!load_doubles(a, w)) return false;
    int info = 0;
    dgesdd_(vectors ? "S" : "N", &m, &n, a, &m, s, u, &m, vt, &r, work, &lwork, iwork, &info, 1);
    if (info != 0) throw std::logic_error("dgesdd: no convergence");
    return true;
  }
};

int64_t svd_doubles(int64_t rows, int64_t cols) {
  const int64_t r = std::min(rows, cols);
  const int m = static_cast<int>(cols), n = static_cast<int>(rows);
  const int64_t work = std::max(Decomposition::work_size(m, n, true), Decomposition::work_size(m, n, false));
  const int64_t doubles = rows * cols + r + cols * r + r * rows + work;
  return doubles + 8 * r;
}
}  // namespace

int64_t svd_scratch_bytes(const Context& ctx, int64_t rows, int64_t cols) {
  return ctx.where == Where::gpu ? 0 : 8 * svd_doubles(rows, cols);
}

void singular_values(Context& ctx, const Tensor& w, std::span<double> values) {
  const OnHost here(ctx, w);
  const HostMemory memory(ctx, svd_doubles(w.rows(), w.cols()));
  Decomposition svd(memory.room(0, svd_doubles(w.rows(), w.cols())), w, /*with_vectors=*/false);
  expect(static_cast<int64_t>(values.size()) == svd.r, "singular_values: need min(rows, cols) values");
  const bool finite = svd.run(*here);
  for (int i = 0; i < svd.r; ++i) values[static_cast<size_t>(i)] = finite ? svd.s[i] : kNaN;
}

double svd_polar(Context& ctx, const Tensor& x, const SvdPolar& how) {
  OnHost here(ctx, x);
  const HostMemory memory(ctx, svd_doubles(x.rows(), x.cols()));
  Decomposition svd(memory.room(0, svd_doubles(x.rows(), x.cols())), x, /*with_vectors=*/true);
  if (!svd.run(*here)) {
    store_nan(*here);
    here.store();
    return kNaN;
  }
  const int64_t m = svd.m, n = svd.n, rank = how.rank > 0 ? how.rank : svd.r;
  double sum = 0;
  std::fill_n(svd.a, m * n, 0.0);  // a's values are spent: it now receives U V^T
  const double cutoff = how.cutoff > 0 ? how.cutoff : (x.dtype == DType::f64 ? 1e-10 : 1e-6);
  for (int64_t k = 0; k < svd.r; ++k) {
    sum += svd.s[k];
    if (k >= rank || !(svd.s[k] > cutoff * svd.s[0])) continue;
    for (int64_t j = 0; j < n; ++j) {
      const double v = svd.vt[k + j * svd.r];
      const double* u = svd.u + k * m;
      double* out = svd.a + j * m;
#pragma omp simd
      for (int64_t i = 0; i < m; ++i) out[i] += u[i] * v;
    }
  }
  store_doubles(*here, [&](int64_t i) { return svd.a[i]; });
  here.store();
  return sum;
}
