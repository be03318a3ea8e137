#include "tests/shampoo_fixture.h"

#include <cmath>
#include <numeric>

Matrix64 of_rank(int64_t rank, int64_t rows, int64_t cols, uint32_t seed) {
  Matrix64 a = normal(rows, rank, seed), b = normal(rank, cols, seed + 1);
  for (Matrix64* m : {&a, &b})
    for (double& x : m->data) x = std::round(2 * x);
  return product(a, b);
}

std::vector<Matrix64> normals(int count, int64_t rows, int64_t cols, uint32_t seed) {
  std::vector<Matrix64> list;
  for (int t = 0; t < count; ++t) list.push_back(normal(rows, cols, seed + static_cast<uint32_t>(t)));
  return list;
}

Matrix64 sum(double a, const Matrix64& x, double b, const Matrix64& y) {
  Matrix64 z = x;
  for (size_t i = 0; i < z.data.size(); ++i) z.data[i] = a * x.data[i] + b * y.data[i];
  return z;
}

double size_of(const Matrix64& m) {
  return std::sqrt(inner(m, m));
}

JacobiEigen jacobi(Matrix64 a) {
  const int64_t n = a.rows;
  Matrix64 v = identity(n);
  for (int sweep = 0; sweep < 60; ++sweep)
    for (int64_t p = 0; p < n; ++p)
      for (int64_t q = p + 1; q < n; ++q) {
        if (a(p, q) == 0) continue;
        const double angle = 0.5 * std::atan2(2 * a(p, q), a(q, q) - a(p, p)), c = std::cos(angle),
                     s = std::sin(angle);
        for (int64_t k = 0; k < n; ++k) {
          const double x = a(k, p), y = a(k, q);
          a(k, p) = c * x - s * y, a(k, q) = s * x + c * y;
        }
        for (int64_t k = 0; k < n; ++k) {
          const double x = a(p, k), y = a(q, k);
          a(p, k) = c * x - s * y, a(q, k) = s * x + c * y;
        }
        for (int64_t k = 0; k < n; ++k) {
          const double x = v(k, p), y = v(k, q);
          v(k, p) = c * x - s * y, v(k, q) = s * x + c * y;
        }
      }
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::ranges::sort(order, [&](int64_t i, int64_t j) { return a(i, i) < a(j, j); });
  JacobiEigen sorted{.values = {}, .vectors = Matrix64(n, n)};
  for (int64_t k = 0; k < n; ++k) {
    const int64_t from = order[static_cast<size_t>(k)];
    sorted.values.push_back(a(from, from));
    for (int64_t i = 0; i < n; ++i) sorted.vectors(i, k) = v(i, from);
  }
  return sorted;
}

Matrix64 power_of(const Matrix64& a, double power, double eps) {
  const JacobiEigen eigen = jacobi(a);
  Matrix64 scaled_vectors = eigen.vectors;
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t k = 0; k < a.rows; ++k)
      scaled_vectors(i, k) *= std::pow(std::max(eigen.values[static_cast<size_t>(k)], 0.0) + eps, power);
  return product(scaled_vectors, eigen.vectors.transposed());
}

Matrix64 orthonormal(Matrix64 x) {
  for (int64_t k = 0; k < x.cols; ++k) {
    for (int pass = 0; pass < 2; ++pass)
      for (int64_t j = 0; j < k; ++j) {
        double along = 0;
        for (int64_t i = 0; i < x.rows; ++i) along += x(i, j) * x(i, k);
        for (int64_t i = 0; i < x.rows; ++i) x(i, k) -= along * x(i, j);
      }
    double square = 0;
    for (int64_t i = 0; i < x.rows; ++i) square += x(i, k) * x(i, k);
    for (int64_t i = 0; i < x.rows; ++i) x(i, k) /= std::sqrt(square);
  }
  return x;
}
