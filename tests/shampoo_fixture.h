// What the tests of shampoo, oneside and soap share: plain float64 loops for oracles, and directions to
// compare with theirs.
#pragma once

#include <gtest/gtest.h>

#include "tests/optim_fixture.h"

/// f32 and f64, with the tolerance for results that go through roots.
template <typename T>
struct Number {
  using type = T;
  static constexpr double tolerance = sizeof(T) == 8 ? 1e-9 : 1e-4;
};
template <typename Body>
void in_both_dtypes(Body&& body) {
  for (const UseDevice use : both_devices()) {
    SCOPED_TRACE(use == on_cpu ? "cpu" : "gpu");
    {
      SCOPED_TRACE("f32");
      body(Number<float>{}, use);
    }
    SCOPED_TRACE("f64");
    body(Number<double>{}, use);
  }
}

/// Of this rank, exactly, in either dtype: products of small integers.
Matrix64 of_rank(int64_t rank, int64_t rows, int64_t cols, uint32_t seed);
std::vector<Matrix64> normals(int count, int64_t rows, int64_t cols, uint32_t seed);
/// a x + b y
Matrix64 sum(double a, const Matrix64& x, double b, const Matrix64& y);
double size_of(const Matrix64& m);

struct JacobiEigen {
  std::vector<double> values;  // ascending
  Matrix64 vectors;            // column k belongs to value k
};
/// By Jacobi's rotations.
JacobiEigen jacobi(Matrix64 a);
/// (A + eps I)^power
Matrix64 power_of(const Matrix64& a, double power, double eps);
/// Q of X = Q R by Gram and Schmidt, twice over.
Matrix64 orthonormal(Matrix64 x);

/// The directions of a rule on some gradients.
template <typename T>
std::vector<MatrixOf<T>> directions(const std::string& rule, const std::vector<Matrix64>& gradients,
                                    UseDevice use, bool transposed = false) {
  RuleDriverOf<T> driver(rule, {MatrixOf<T>(gradients[0].rows, gradients[0].cols)}, transposed, use);
  std::vector<MatrixOf<T>> list;
  for (const Matrix64& g : gradients) {
    driver.step({as<T>(g)});
    list.push_back(driver.direction());
  }
  return list;
}

template <typename T>
void expect_same(const std::vector<MatrixOf<T>>& got, const std::vector<MatrixOf<T>>& want,
                 double tolerance) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t t = 0; t < want.size(); ++t) EXPECT_LT(deviation(got[t], want[t]), tolerance) << "step " << t;
}
template <typename T, typename Oracle>
void expect_oracle(const std::string& rule, Oracle oracle, const std::vector<Matrix64>& gradients,
                   UseDevice use, double tolerance) {
  SCOPED_TRACE(rule);
  std::vector<MatrixOf<T>> want;
  for (const Matrix64& g : gradients) want.push_back(as<T>(oracle.direction(g)));
  expect_same(directions<T>(rule, gradients, use), want, tolerance);
}
