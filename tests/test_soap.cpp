// soap on the CPU and on a GPU or in the executor, by the same bodies, against an oracle and against Adam;
// special gradients of it are in test_shampoo.cpp.
#include <gtest/gtest.h>

#include <cmath>

#include "tests/shampoo_fixture.h"

namespace {
/// SOAP's formulas by themselves: m is rotated anew at every step, bases are by Jacobi and Gram-Schmidt.
struct SoapOracle {
  double beta = 0.95, beta1 = 0.95, beta2 = 0.95, eps = 1e-8;
  bool left = true, right = true;
  int freq = 10, t = 0;
  Matrix64 L = {}, R = {}, QL = {}, QR = {}, m = {}, v = {};

  Matrix64 direction(const Matrix64& g) {
    Matrix64 u(g.rows, g.cols);
    if (t++ == 0) {
      L = Matrix64(g.rows, g.rows), R = Matrix64(g.cols, g.cols), m = v = u;
      QL = identity(g.rows), QR = identity(g.cols);
    } else {
      const auto rotated = [&](const Matrix64& x) { return product(product(QL.transposed(), x), QR); };
      m = sum(beta1, m, 1 - beta1, g);
      const Matrix64 x = rotated(g), mean = rotated(m);
      for (size_t i = 0; i < u.data.size(); ++i) {
        v.data[i] = beta2 * v.data[i] + (1 - beta2) * x.data[i] * x.data[i];
        u.data[i] = mean.data[i] / (1 - std::pow(beta1, t - 1)) /
                    (std::sqrt(v.data[i] / (1 - std::pow(beta2, t - 1))) + eps);
      }
      u = product(product(QL, u), QR.transposed());
    }
    L = sum(beta, L, 1 - beta, product(g, g.transposed()));
    R = sum(beta, R, 1 - beta, product(g.transposed(), g));
    if (t == 1 || (t - 1) % freq == 0) {
      if (left) QL = t == 1 ? jacobi(L).vectors : orthonormal(product(L, QL));
      if (right) QR = t == 1 ? jacobi(R).vectors : orthonormal(product(R, QR));
    }
    return u;
  }
};
}  // namespace

TEST(Soap, SameAsAnOracle) {
  in_both_dtypes([](auto number, UseDevice use) {
    using T = typename decltype(number)::type;
    const double tolerance = 30 * number.tolerance;
    const auto check = [&](const std::string& rule, const SoapOracle& oracle,
                           const std::vector<Matrix64>& gradients) {
      expect_oracle<T>(rule, oracle, gradients, use, tolerance);
    };
    // Square, or the smaller side alone: the first gradient decides the whole basis.
    check("soap:freq=3", {.freq = 3}, normals(8, 5, 5, 70));
    check("soap:freq=1,beta=0.7,beta1=0.5,beta2=0.8,eps=1e-3",
          {.beta = 0.7, .beta1 = 0.5, .beta2 = 0.8, .eps = 1e-3, .freq = 1}, normals(5, 5, 5, 71));
    check("soap:freq=2,sides=one", {.right = false, .freq = 2}, normals(5, 4, 9, 72));
    check("soap:freq=2,max_side=4", {.left = false, .freq = 2}, normals(5, 9, 4, 73));
    check("soap:beta1=0,beta2=0,sides=one", {.beta1 = 0, .beta2 = 0, .left = false}, normals(3, 6, 5, 74));
  });
}

// Rotating the gradients rotates the directions; Adam's depend on the coordinates.
TEST(Soap, KnowsNoCoordinates) {
  for (const UseDevice use : both_devices()) {
    const Matrix64 P = orthonormal(normal(6, 6, 1)), Q = orthonormal(normal(6, 6, 2));
    const auto gradients = normals(5, 6, 6, 80);
    std::vector<Matrix64> rotated;
    for (const Matrix64& g : gradients) rotated.push_back(product(product(P, g), Q));
    const auto both = [&](const std::string& rule) {
      const Matrix64 want = product(product(P, directions<double>(rule, gradients, use)[4]), Q);
      return deviation(directions<double>(rule, rotated, use)[4], want);
    };
    EXPECT_LT(both("soap:freq=2"), 1e-8);
    EXPECT_LT(both("shampoo:graft=none"), 1e-8);
    EXPECT_GT(both("adam"), 0.1);
  }
}

// In a basis of unit vectors it is Adam, a step late.
TEST(Soap, IsAdamOnDiagonalGradients) {
  in_both_dtypes([](auto number, UseDevice use) {
    using T = typename decltype(number)::type;
    std::vector<Matrix64> gradients(6, Matrix64(5, 5));
    for (size_t t = 0; t < gradients.size(); ++t)
      for (int64_t i = 0; i < 5; ++i)
        gradients[t](i, i) = normal(1, 5, 30 + static_cast<uint32_t>(t)).data[static_cast<size_t>(i)];
    const std::vector<Matrix64> later(gradients.begin() + 1, gradients.end());
    const auto want = directions<T>("adam:beta1=0.95,beta2=0.95,eps=1e-3", later, use);
    for (const char* rule : {"soap:eps=1e-3,freq=1", "soap:eps=1e-3,freq=2", "soap:eps=1e-3,max_side=1"}) {
      auto got = directions<T>(rule, gradients, use);
      for (const T x : got[0].data) EXPECT_EQ(x, 0);
      got.erase(got.begin());
      expect_same(got, want, number.tolerance / 10);
    }
    const auto any = normals(4, 3, 6, 40);  // no side is rotated
    auto got = directions<T>("soap:max_side=2", any, use);
    got.erase(got.begin());
    expect_same(got, directions<T>("adam:beta1=0.95,beta2=0.95", {any.begin() + 1, any.end()}, use),
                number.tolerance / 10);
  });
}
