// Eigenvalues and orthonormal bases by LAPACK, on the CPU and on a GPU or in the executor, by the same
// bodies.
#include "optim/eigen.h"

#include <gtest/gtest.h>

#include <cmath>

#include "optim/svd.h"
#include "tests/linear_algebra_fixture.h"

namespace {
void check_eigen(const Setting& setting) {
  Bench bench(setting);
  for (const int64_t n : {1, 2, 17, 40})
    for (const double scale : {1.0, 1e-20, 1e20}) {
      SCOPED_TRACE(testing::Message() << n << " scaled " << scale);
      std::vector<double> expected;  // negative ones, and equal ones
      for (int64_t i = 0; i < n; ++i) {
        const int64_t pair = i / 2;  // every eigenvalue twice
        expected.push_back(static_cast<double>(pair) - 3);
      }
      const Matrix64 a = bench.rounded(scaled(symmetric(expected, 5), scale));
      const Tensor vectors = bench.put(a), values = bench.room({n});
      symmetric_eigen(bench.ctx, {.values = values, .vectors = vectors, .a = vectors});
      const Matrix64 v = bench.get(vectors), found = bench.get(values);
      Matrix64 diagonal(n, n);
      for (int64_t i = 0; i < n; ++i) {
        diagonal(i, i) = found.data[static_cast<size_t>(i)];
        EXPECT_NEAR(found.data[static_cast<size_t>(i)] / scale, expected[static_cast<size_t>(i)],
                    20 * bench.unit);
      }
      EXPECT_LT(deviation(product(v.transposed(), v), identity(n)), 10 * bench.unit);
      EXPECT_LT(deviation(product(product(v, diagonal), v.transposed()), a), 10 * bench.unit);
    }
  Matrix64 bad = identity(4);
  bad(3, 1) = NAN;
  const Tensor vectors = bench.put(bad), values = bench.room({4});
  symmetric_eigen(bench.ctx, {.values = values, .vectors = vectors, .a = vectors});
  EXPECT_TRUE(all_nan(bench.get(vectors)) && all_nan(bench.get(values)));
}

/// Matrix i of those below one another.
Matrix64 part(const Matrix64& all, int64_t i, int64_t rows) {
  Matrix64 m(rows, all.cols);
  std::copy_n(&all.data[static_cast<size_t>(i * rows * all.cols)], rows * all.cols, m.data.begin());
  return m;
}

/// More matrices than threads, one of them not finite: each as if it were alone, whatever the threads.
void check_side_by_side(const Setting& setting) {
  constexpr int64_t kCount = 5, m = 24, r = 10;
  for (const int threads : {1, 2, 3, 8}) {
    SCOPED_TRACE(testing::Message() << threads << " threads");
    Bench bench(setting);
    bench.ctx.threads = threads;
    Matrix64 x = normal(kCount * m, r, 4), a(kCount * m, m);
    for (int64_t i = 0; i < kCount; ++i) {
      std::vector<double> values(static_cast<size_t>(m), 1 + static_cast<double>(i));
      const Matrix64 one = symmetric(values, static_cast<uint32_t>(i));
      std::copy(one.data.begin(), one.data.end(), a.data.begin() + i * m * m);
    }
    x(3 * m, 2) = a(3 * m + 1, 1) = NAN;
    const Tensor there = bench.put(x, kCount);
    std::vector<Qr> list;
    for (int64_t i = 0; i < kCount; ++i) list.push_back({.q = there[i], .x = there[i]});
    qr(bench.ctx, list);
    const Matrix64 roots =
        bench.root(a, {.x = {}, .a = {}, .power = -0.5, .method = RootMethod::eigen}, kCount);
    for (int64_t i = 0; i < kCount; ++i) {
      const Matrix64 q = bench.get(list[static_cast<size_t>(i)].q), root = part(roots, i, m);
      if (i == 3) {
        EXPECT_TRUE(all_nan(q) && all_nan(root));
        continue;
      }
      EXPECT_LT(deviation(q, bench.orthonormal(part(x, i, m))), 10 * bench.unit);
      EXPECT_LT(deviation(root, scaled(identity(m), 1 / std::sqrt(1.0 + static_cast<double>(i)))),
                10 * bench.unit);
    }
  }
}

void check_qr(const Setting& setting) {
  Bench bench(setting);
  for (const auto& [m, r] :
       {std::pair<int64_t, int64_t>{1, 1}, {5, 1}, {6, 6}, {31, 7}, {64, 40}, {210, 200}})
    for (const double scale : {1.0, 1e-20}) {
      SCOPED_TRACE(testing::Message() << m << " x " << r << " scaled " << scale);
      const Matrix64 x = bench.rounded(scaled(normal(m, r, 3), scale)), q = bench.orthonormal(x);
      EXPECT_LT(deviation(product(q.transposed(), q), identity(r)), 10 * bench.unit);
      Matrix64 upper = product(q.transposed(), x);
      for (int64_t i = 0; i < r; ++i)
        for (int64_t j = 0; j < i; ++j) {
          EXPECT_LT(std::fabs(upper(i, j)) / scale, 40 * bench.unit);
          upper(i, j) = 0;
        }
      EXPECT_LT(deviation(product(q, upper), x), 10 * bench.unit);
      if (m > 1) {
        EXPECT_LT(upper(0, 0) * x(0, 0), 0);  // the sign convention
      }
    }
  Matrix64 gap = normal(9, 4, 8);  // a column of zeros, and one twice
  for (int64_t i = 0; i < 9; ++i) {
    gap(i, 1) = 0;
    gap(i, 3) = gap(i, 2);
  }
  gap = bench.rounded(gap);
  const Matrix64 q = bench.orthonormal(gap), r = product(q.transposed(), gap);
  EXPECT_LT(deviation(product(q.transposed(), q), identity(4)), 10 * bench.unit);
  EXPECT_LT(deviation(product(q, r), gap), 10 * bench.unit);
  EXPECT_NEAR(r(1, 1), 0, 10 * bench.unit);
  EXPECT_NEAR(r(3, 3), 0, 10 * bench.unit);
  const Matrix64 of_zero = bench.orthonormal(Matrix64(5, 3));
  for (int64_t i = 0; i < 5; ++i)
    for (int64_t j = 0; j < 3; ++j) EXPECT_EQ(of_zero(i, j), i == j);
  gap(8, 0) = INFINITY;
  EXPECT_TRUE(all_nan(bench.orthonormal(gap)));
  EXPECT_THROW(bench.orthonormal(Matrix64(3, 4)), ShapeError);
}

/// (G G^T)^(-1/4) G (G^T G)^(-1/4) = U V^T, also of rank 1 and 3 (equations 15 and 16 of arXiv 2409.20325).
void check_pseudo_inverse(const Setting& setting) {
  Bench bench(setting);
  for (const int64_t rank : {1, 3, 9}) {
    const Matrix64 g = product(normal(14, rank, 1), normal(rank, 9, 2));
    const InverseRoot args{.x = {}, .a = {}, .power = -0.25, .pseudo = true};
    const Matrix64 left = bench.root(product(g, g.transposed()), args),
                   right = bench.root(product(g.transposed(), g), args);
    Bench host({on_cpu, DType::f64});
    const Tensor polar = host.put(g);
    svd_polar(host.ctx, polar);
    EXPECT_LT(deviation(product(product(left, g), right), host.get(polar)), 100 * bench.unit) << rank;
  }
}

class LinearAlgebra : public testing::TestWithParam<Setting> {};
}  // namespace

INSTANTIATE_TEST_SUITE_P(On, LinearAlgebra, testing::ValuesIn(settings()), setting_name);

TEST_P(LinearAlgebra, SymmetricEigen) {
  check_eigen(GetParam());
}
TEST_P(LinearAlgebra, SideBySide) {
  check_side_by_side(GetParam());
}
TEST_P(LinearAlgebra, Qr) {
  check_qr(GetParam());
}
TEST_P(LinearAlgebra, PseudoInverseGivesThePolarFactor) {
  check_pseudo_inverse(GetParam());
}

TEST(HostRoom, WhatOneThreadThrowsReachesTheCaller) {
  Context ctx;
  use_cpu(ctx, 2);
  ctx.scratch.reserve(1024);
  const auto too_much = [](int64_t i, HostRoom& room) { room.doubles(i == 1 ? 5 : 4); };
  EXPECT_THROW(side_by_side(ctx, 2, 4, too_much), ShapeError);
  EXPECT_NO_THROW(side_by_side(ctx, 1, 4, too_much));
}
