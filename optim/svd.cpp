#include "optim/svd.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "model/kernels/simd.h"

// Fortran: every argument by address, matrices by columns, the length of a character string last.
extern "C" void dgesdd_(const char* job, const int* m, const int* n, double* a, const int* lda, double* s,
                        double* u, const int* ldu, double* vt, const int* ldvt, double* work,
                        const int* lwork, int* iwork, int* info, size_t job_length);

namespace {
constexpr double kCutoff =
    1e-10;  // of the largest singular value; float32 inputs carry real ones down to 1e-7
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// Working memory on the host: scratch on the CPU; on a GPU, whose scratch is out of reach, blocks of its
/// own.
class HostMemory {
 public:
  explicit HostMemory(Context& ctx) : ctx_(ctx), frame_(ctx.scratch) {}
  double* doubles(int64_t count) {
    if (ctx_.where == Where::cpu) return frame_.doubles(count);
    return blocks_.emplace_back(static_cast<size_t>(count)).data();
  }

 private:
  Context& ctx_;
  Scratch::Frame frame_;
  std::vector<std::vector<double>> blocks_;
};

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

  Decomposition(HostMemory& memory, const Tensor& w, bool with_vectors)
      : m(static_cast<int>(w.cols())),
        n(static_cast<int>(w.rows())),
        r(std::min(m, n)),
        vectors(with_vectors) {
    const int64_t M = m, N = n, R = r;
    lwork = work_size(m, n, vectors);
    a = memory.doubles(M * N);
    s = memory.doubles(R);
    u = memory.doubles(vectors ? M * R : 1);
    vt = memory.doubles(vectors ? R * N : 1);
    work = memory.doubles(lwork);
    iwork = reinterpret_cast<int*>(memory.doubles(4 * R));
  }

  /// False when the input is not finite.
  bool run(const Tensor& w) {
    double finite = 0;  // 0 * x is 0, or NaN for anything that is not finite
    for_real_type(w.dtype, [&]<typename T>(T) {
      const T* x = reals_of<T>(w);
      for (int64_t i = 0; i < w.size(); ++i) finite += 0.0 * (a[i] = x[i]);
    });
    if (finite != 0) return false;
    int info = 0;
    dgesdd_(vectors ? "S" : "N", &m, &n, a, &m, s, u, &m, vt, &r, work, &lwork, iwork, &info, 1);
    if (info != 0) throw std::logic_error("dgesdd: no convergence");
    return true;
  }
};
}  // namespace

int64_t svd_scratch_bytes(const Context& ctx, int64_t rows, int64_t cols) {
  if (ctx.where == Where::gpu) return 0;
  const int64_t r = std::min(rows, cols);
  const int m = static_cast<int>(cols), n = static_cast<int>(rows);
  const int64_t work = std::max(Decomposition::work_size(m, n, true), Decomposition::work_size(m, n, false));
  const int64_t doubles = rows * cols + r + cols * r + r * rows + work;
  return doubles * 8 + 8 * r * 4;
}

void singular_values(Context& ctx, const Tensor& w, std::span<double> values) {
  const OnHost here(ctx, w);
  HostMemory memory(ctx);
  Decomposition svd(memory, w, /*with_vectors=*/false);
  expect(static_cast<int64_t>(values.size()) == svd.r, "singular_values: need min(rows, cols) values");
  const bool finite = svd.run(*here);
  for (int i = 0; i < svd.r; ++i) values[static_cast<size_t>(i)] = finite ? svd.s[i] : kNaN;
}

double svd_polar(Context& ctx, const Tensor& x) {
  OnHost here(ctx, x);
  HostMemory memory(ctx);
  Decomposition svd(memory, x, /*with_vectors=*/true);
  const auto store = [&](auto&& value) {
    for_real_type(x.dtype, [&]<typename T>(T) {
      T* to = reals_of<T>(*here);
      for (int64_t i = 0; i < x.size(); ++i) to[i] = static_cast<T>(value(i));
    });
    here.store();
  };
  if (!svd.run(*here)) {
    store([](int64_t) { return kNaN; });
    return kNaN;
  }
  const int64_t m = svd.m, n = svd.n;
  double sum = 0;
  std::fill_n(svd.a, m * n, 0.0);  // a's values are spent: it now receives U V^T
  for (int64_t k = 0; k < svd.r; ++k) {
    sum += svd.s[k];
    if (!(svd.s[k] > kCutoff * svd.s[0])) continue;
    for (int64_t j = 0; j < n; ++j) {
      const double v = svd.vt[k + j * svd.r];
      const double* u = svd.u + k * m;
      double* out = svd.a + j * m;
#pragma omp simd
      for (int64_t i = 0; i < m; ++i) out[i] += u[i] * v;
    }
  }
  store([&](int64_t i) { return svd.a[i]; });
  return sum;
}
