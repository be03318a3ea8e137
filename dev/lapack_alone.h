// LAPACK by itself, called as rules call it: a matrix on each thread. What the time of a rule in LAPACK is to
// be held against. Only bench_rules.cpp includes this.
//
//   eigen     dsyevd, and dsyrk for the product of the scaled vectors, as inverse_root does: of X X^T
//   qr        dgelqt in blocks of 32, the reflections alone: half of a QR, and at its rate
//
// X (n, m) of normal numbers. FLOPs are counted as in optim/eigen.h. CPU only.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <vector>

#include "model/kernels/blas.h"
#include "optim/eigen.h"
#include "random.h"

// Fortran: every argument by address, matrices by columns, the length of character strings last.
extern "C" {
void dsyevd_(const char* job, const char* triangle, const int* n, double* a, const int* lda, double* w,
             double* work, const int* lwork, int* iwork, const int* liwork, int* info, size_t job_length,
             size_t triangle_length);
void dsyrk_(const char* triangle, const char* transpose, const int* n, const int* k, const double* alpha,
            const double* a, const int* lda, const double* beta, double* c, const int* ldc,
            size_t triangle_length, size_t transpose_length);
void dgelqt_(const int* m, const int* n, const int* block, double* a, const int* lda, double* t,
             const int* ldt, double* work, int* info);
}

class LapackAlone {
 public:
  explicit LapackAlone(Context& ctx) : ctx_(ctx) {}

  /// FLOP/s of eigenvectors at side n, all threads together.
  double eigen(int64_t n) {
    const auto side = static_cast<int>(n);
    const int64_t work = 1 + 6 * n + 2 * n * n, ints = 3 + 5 * n;  // the least that dsyevd takes
    return rate(eigen_flops(n) + std::pow(static_cast<double>(n), 3), 3 * n * n + n + work + ints,
                [=](HostRoom& room, Random& random) {
                  double *x = room.doubles(n * n), *a = room.doubles(n * n), *out = room.doubles(n * n);
                  double *values = room.doubles(n), *space = room.doubles(work);
                  int* integers = room.ints(ints);
                  fill(x, n * n, random);
                  blas_dgemm('N', 'T', n, n, n, 1, x, n, x, n, 0, a, n);
                  return [=] {
                    const int lwork = static_cast<int>(work), liwork = static_cast<int>(ints);
                    const double one = 1, zero = 0;
                    int info = 0;
                    dsyevd_("V", "L", &side, a, &side, values, space, &lwork, integers, &liwork, &info, 1, 1);
                    dsyrk_("L", "N", &side, &side, &one, a, &side, &zero, out, &side, 1, 1);
                  };
                });
  }

  /// FLOP/s of the reflections of a matrix (m, r).
  double qr(int64_t m, int64_t r) {
    const int64_t block = std::min<int64_t>(32, r);
    const auto R = static_cast<double>(r);
    return rate(
        2 * R * R * (static_cast<double>(m) - R / 3), m * r + 2 * block * r,
        [=](HostRoom& room, Random& random) {
          double *x = room.doubles(m * r), *t = room.doubles(block * r), *work = room.doubles(block * r);
          fill(x, m * r, random);
          return [=] {
            const int rows = static_cast<int>(r), cols = static_cast<int>(m), nb = static_cast<int>(block);
            int info = 0;
            dgelqt_(&rows, &cols, &nb, x, &rows, t, &nb, work, &info);
          };
        });
  }

 private:
  static void fill(double* x, int64_t n, Random& random) {
    for (int64_t i = 0; i < n; ++i) {
      float value = 0, unused = 0;
      random.normal_pair(value, unused);
      x[i] = value;
    }
  }

  /// The median of a few. `prepare` makes the operands of a matrix, and what is to be timed; the threads'
  /// times are taken apart from that, and the slowest counts.
  template <typename Prepare>
  double rate(double flops, int64_t doubles, const Prepare& prepare) {
    constexpr int kRuns = 5;
    ctx_.scratch.reserve(side_by_side_bytes(ctx_, ctx_.threads, doubles));
    std::vector<double> seconds(kRuns);
    for (double& slowest : seconds) {
      std::vector<double> own(static_cast<size_t>(ctx_.threads));
      side_by_side(ctx_, ctx_.threads, doubles, [&](int64_t i, HostRoom& room) {
        Random random(1, static_cast<uint64_t>(i));
        const auto work = prepare(room, random);
        const auto start = std::chrono::steady_clock::now();
        work();
        own[static_cast<size_t>(i)] =
            std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      });
      slowest = std::ranges::max(own);
    }
    std::ranges::nth_element(seconds, seconds.begin() + kRuns / 2);
    return ctx_.threads * flops / seconds[kRuns / 2];
  }

  Context& ctx_;
};
