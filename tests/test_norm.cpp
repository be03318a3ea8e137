// Norms, duals and dualizers: expected numbers, and the properties that define them.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "optim/modular.h"
#include "optim/norm.h"
#include "optim/svd.h"
#include "tests/norm_fixture.h"

namespace {
using nlohmann::json;

/// An orthogonal matrix: the polar factor of a random one.
Matrix random_orthogonal(Context& ctx, int64_t n, uint32_t seed) {
  return dualized(ctx, *find_norm("l2-l2"), random_matrix(n, n, seed));
}
}  // namespace

TEST(Norm, ExpectedNumbers) {
  check_expected_norms<float>(on_cpu);
  check_expected_norms<double>(on_cpu);
}

class EveryNorm : public testing::TestWithParam<Norm> {};
INSTANTIATE_TEST_SUITE_P(Norm, EveryNorm, testing::ValuesIn(matrix_norms()), [](const auto& info) {
  std::string name = norm_name(info.param);
  std::ranges::replace(name, '-', '_');
  std::ranges::replace(name, '.', '_');
  return name;
});

namespace {
template <typename T>
void check_duality(const Norm& kind, double tolerance) {
  CpuContext ctx;
  uint32_t seed = 1;
  for (const auto& [rows, cols] : {std::pair{7, 4}, {4, 7}, {1, 9}, {9, 1}, {17, 33}, {1, 1}}) {
    SCOPED_TRACE(testing::Message() << rows << " x " << cols);
    const auto g = as<T>(random_matrix(rows, cols, seed++)), d = dualized(ctx, kind, g);
    const double dual = dual_of(ctx, kind, g);
    EXPECT_NEAR(inner(g, d) / dual, 1, tolerance);
    EXPECT_NEAR(norm_of(ctx, kind, d), 1, tolerance);
    EXPECT_LT(deviation(dualized(ctx, kind, scaled(g, 3.7)), d), tolerance);
    EXPECT_LT(deviation(dualized(ctx, kind, scaled(g, -1)), scaled(d, -1)), tolerance);
  }
}
}  // namespace

TEST_P(EveryNorm, DualVectorHasUnitNormAndAttainsTheDualNorm) {
  check_duality<float>(GetParam(), 2e-6);
  check_duality<double>(GetParam(), 1e-12);
}

TEST_P(EveryNorm, HoelderAndNormAxioms) {
  CpuContext ctx;
  const Norm kind = GetParam();
  for (uint32_t seed = 0; seed < 60; ++seed) {
    const Matrix g = random_matrix(5, 8, seed), t = random_matrix(5, 8, 1000 + seed);
    const double norm_t = norm_of(ctx, kind, t);
    EXPECT_LE(std::fabs(inner(g, t)), dual_of(ctx, kind, g) * norm_t * (1 + 1e-6));
    Matrix sum = g;
    for (size_t i = 0; i < sum.data.size(); ++i) sum.data[i] += t.data[i];
    EXPECT_LE(norm_of(ctx, kind, sum), (norm_of(ctx, kind, g) + norm_t) * (1 + 1e-6));
    EXPECT_NEAR(norm_of(ctx, kind, scaled(t, -2.5)) / norm_t, 2.5, 1e-5);
  }
}

TEST_P(EveryNorm, SteepestDescentIsTheMinimum) {  // Proposition 1
  CpuContext ctx;
  const Norm kind = GetParam();
  const double lambda = 3;
  const Matrix g = random_matrix(6, 4, 5);
  const double dual = dual_of(ctx, kind, g);
  const auto q = [&](const Matrix& dw) {
    return inner(g, dw) + lambda / 2 * std::pow(norm_of(ctx, kind, dw), 2);
  };
  const Matrix best = scaled(dualized(ctx, kind, g), -dual / lambda);
  EXPECT_NEAR(q(best) / (-dual * dual / (2 * lambda)), 1, 1e-5);
  uint32_t seed = 100;
  for (const double size : {1e-2, 1e-1, 1.0, 10.0})
    for (int i = 0; i < 100; ++i) {
      Matrix other = random_matrix(6, 4, seed++);
      for (size_t k = 0; k < other.data.size(); ++k)
        other.data[k] = static_cast<float>(best.data[k] + size * other.data[k]);
      EXPECT_GE(q(other), q(best) - 1e-5 * std::fabs(q(best)));
    }
}

TEST_P(EveryNorm, HardInputs) {
  CpuContext ctx;
  const Norm kind = GetParam();
  const Matrix zero(4, 3);
  EXPECT_EQ(norm_of(ctx, kind, zero), 0);
  EXPECT_EQ(dual_of(ctx, kind, zero), 0);
  for (float x : dualized(ctx, kind, zero).data) EXPECT_EQ(x, 0);

  const Matrix g = random_matrix(4, 3, 9);
  const Matrix tiny = scaled(g, 1e-20);
  EXPECT_NEAR(norm_of(ctx, kind, tiny) / (1e-20 * norm_of(ctx, kind, g)), 1, 1e-5);
  EXPECT_LT(deviation(dualized(ctx, kind, tiny), dualized(ctx, kind, g)), 1e-5);

  Matrix holes = g;  // a zero row and a zero column
  for (int64_t j = 0; j < 3; ++j) holes(2, j) = 0;
  for (int64_t i = 0; i < 4; ++i) holes(i, 1) = 0;
  const Matrix d = dualized(ctx, kind, holes);
  for (int64_t j = 0; j < 3; ++j) EXPECT_NEAR(d(2, j), 0, 1e-7);
  for (int64_t i = 0; i < 4; ++i) EXPECT_NEAR(d(i, 1), 0, 1e-7);

  Matrix bad = g;
  bad(1, 2) = std::nanf("");
  EXPECT_TRUE(std::isnan(norm_of(ctx, kind, bad)));
  EXPECT_TRUE(std::isnan(dual_of(ctx, kind, bad)));
  bool any = false;
  for (float x : dualized(ctx, kind, bad).data) any |= std::isnan(x);
  EXPECT_TRUE(any);
}

TEST_P(EveryNorm, BatchEqualsOneByOne) {
  CpuContext ctx;
  const Norm kind = GetParam();
  for (const bool transposed : {false, true}) {
    Matrix all = random_matrix(3 * 5, 4, 11);
    const Tensor batch{all.data.data(), Shape{3, 5, 4}};
    std::vector<double> values(3), duals(3);
    norms(ctx, kind, batch, transposed, values);
    dual_norms(ctx, kind, batch, transposed, duals);
    std::vector<float> one = all.data;
    const Tensor copy{one.data(), Shape{3, 5, 4}};
    for (int64_t i = 0; i < 3; ++i) {
      EXPECT_EQ(norm(ctx, kind, batch[i], transposed), values[static_cast<size_t>(i)]);
      EXPECT_EQ(dual_norm(ctx, kind, batch[i], transposed), duals[static_cast<size_t>(i)]);
      dualize(ctx, {.out = copy[i], .g = copy[i], .norm = kind, .transposed = transposed});
    }
    dualize(ctx, {.out = batch, .g = batch, .norm = kind, .transposed = transposed});  // in place
    EXPECT_EQ(all.data, one);
  }
}

TEST_P(EveryNorm, ScratchIsWhatIsPublished) {
  for (const auto& [batch, rows, cols] : {std::tuple{1, 7, 4}, {3, 4, 7}, {1, 1, 9}, {2, 130, 33}})
    for (const DType dtype : {DType::f32, DType::f64}) {
      Matrix64 memory = as<double>(random_matrix(batch * rows, cols, 3));  // as f32: some numbers or other
      const Tensor g(memory.data.data(), dtype, {batch, rows, cols});
      if (dtype == DType::f32)
        upload(*std::make_unique<CpuContext>(), g, random_matrix(batch * rows, cols, 3));
      CpuContext ctx(2, 0);
      ctx.scratch.reserve(norm_scratch_bytes(ctx, GetParam(), g.shape, dtype));
      std::vector<double> values(static_cast<size_t>(batch));
      norms(ctx, GetParam(), g, /*transposed=*/false, values);
      dual_norms(ctx, GetParam(), g, /*transposed=*/true, values);
      dualize(ctx, {.out = g, .g = g, .norm = GetParam()});
      dualize(ctx, {.out = g, .g = g, .norm = GetParam(), .transposed = true});
    }
}

// Polar factors turn with any rotation of inputs and outputs; signs, columns and rows only with signed
// permutations.
TEST(Norm, OnlyTheSpectralNormIsRotationInvariant) {
  CpuContext ctx;
  const Matrix g = random_matrix(6, 4, 21), q = random_orthogonal(ctx, 6, 22),
               p = random_orthogonal(ctx, 4, 23);
  const Matrix turned = product(product(q, g), p);
  for (const Norm kind : matrix_norms()) {
    const Matrix d = product(product(q, dualized(ctx, kind, g)), p);
    const bool invariant =
        is_spectral(kind) || kind.kind == NormKind::frobenius || kind.kind == NormKind::nuclear;
    EXPECT_EQ(deviation(dualized(ctx, kind, turned), d) < 1e-5, invariant) << norm_name(kind);
  }
  Matrix signed_permutation(6, 6);
  const int64_t to[] = {3, 0, 5, 1, 4, 2};
  for (int64_t i = 0; i < 6; ++i) signed_permutation(i, to[i]) = i % 2 ? -1.0f : 1.0f;
  for (const Norm kind : matrix_norms())
    EXPECT_LT(deviation(dualized(ctx, kind, product(signed_permutation, g)),
                        product(signed_permutation, dualized(ctx, kind, g))),
              1e-5)
        << norm_name(kind);
}

TEST(Norm, Ordering) {  // s_max <= ||W||_F <= sum of singular values
  CpuContext ctx;
  for (uint32_t seed = 0; seed < 20; ++seed) {
    const Matrix w = random_matrix(5, 9, seed);
    EXPECT_LE(norm_of(ctx, *find_norm("l2-l2"), w), norm_of(ctx, *find_norm("frobenius"), w));
    EXPECT_LE(norm_of(ctx, *find_norm("frobenius"), w), dual_of(ctx, *find_norm("l2-l2"), w));
  }
}

// Proposition 8: ||M||_{l1->lp} = max_j ||col_j||_p and ||M||_{lp->linf} = max_i ||row_i||_{p/(p-1)}, by
// brute force: no unit vector is stretched more, and some vector is stretched as much.
TEST(Norm, OperatorNormsAgainstRandomVectors) {
  CpuContext ctx;
  const Matrix m = random_matrix(5, 7, 31);
  const auto power_norm = [](const Matrix& x, double p) {
    double sum = 0, largest = 0;
    for (float v : x.data) {
      sum += std::pow(std::fabs(v), p);
      largest = std::max(largest, std::fabs(static_cast<double>(v)));
    }
    return std::isinf(p) ? largest : std::pow(sum, 1 / p);
  };
  const auto rms = [&](const Matrix& x) {
    return power_norm(x, 2) / std::sqrt(static_cast<double>(x.data.size()));
  };
  const double inf = INFINITY;
  const auto p_norm = [&](double p) { return [=](const Matrix& x) { return power_norm(x, p); }; };
  using Measure = std::function<double(const Matrix&)>;
  struct Case {
    Norm kind;
    Measure from, to;
  };
  std::vector<Case> cases = {{*find_norm("l1-linf"), p_norm(1), p_norm(inf)},
                             {*find_norm("l1-l1"), p_norm(1), p_norm(1)},
                             {*find_norm("l1-l2"), p_norm(1), p_norm(2)},
                             {*find_norm("l1-rms"), p_norm(1), rms},
                             {*find_norm("l2-linf"), p_norm(2), p_norm(inf)},
                             {*find_norm("rms-linf"), rms, p_norm(inf)},
                             {*find_norm("linf-linf"), p_norm(inf), p_norm(inf)},
                             {*find_norm("l2-l2"), p_norm(2), p_norm(2)},
                             {*find_norm("rms-rms"), rms, rms}};
  for (const double p : {4.0 / 3, 1.5, 2.5, 3.0, 10.0}) {
    cases.push_back({{NormKind::l1_lp, p}, p_norm(1), p_norm(p)});
    cases.push_back({{NormKind::lp_linf, p}, p_norm(p), p_norm(inf)});
  }
  for (const Case& c : cases) {
    const double value = norm_of(ctx, c.kind, m);
    double best = 0;
    const auto stretch = [&](const Matrix& x) { best = std::max(best, c.to(product(m, x)) / c.from(x)); };
    for (uint32_t seed = 0; seed < 3000; ++seed) stretch(random_matrix(7, 1, seed));
    for (int64_t j = 0; j < 7; ++j) {  // one-hot attains norms out of l1
      Matrix x(7, 1);
      x(j, 0) = 1;
      stretch(x);
    }
    for (int64_t i = 0; i < 5; ++i) {  // rows and their signs attain norms into linf
      Matrix row(7, 1), signs(7, 1);
      for (int64_t j = 0; j < 7; ++j) {
        row(j, 0) = m(i, j);
        signs(j, 0) = m(i, j) > 0 ? 1.0f : -1.0f;
      }
      stretch(row);
      stretch(signs);
      if (c.kind.kind != NormKind::lp_linf || c.kind.p == 1) continue;
      Matrix x(7, 1);  // where Hoelder's inequality for the row is an equality
      for (int64_t j = 0; j < 7; ++j)
        x(j, 0) =
            static_cast<float>(std::copysign(std::pow(std::fabs(m(i, j)), 1 / (c.kind.p - 1)), m(i, j)));
      stretch(x);
    }
    Matrix x = random_matrix(7, 1, 77);  // the power method attains l2->l2
    for (int i = 0; i < 300; ++i) x = product(product(m.transposed(), m), scaled(x, 1 / power_norm(x, 2)));
    stretch(x);
    EXPECT_LE(best, value * (1 + 1e-5)) << norm_name(c.kind);
    EXPECT_GE(best, value * (1 - 1e-5)) << norm_name(c.kind);
  }
}

TEST(Norm, RmsOfVectors) {
  CpuContext ctx;
  Matrix g = random_matrix(1, 11, 41);
  const Tensor v{g.data.data(), Shape{11}};
  const double length = std::sqrt(inner(g, g));
  EXPECT_NEAR(norm(ctx, *find_norm("rms"), v), length / std::sqrt(11.0), 1e-6);
  EXPECT_NEAR(dual_norm(ctx, *find_norm("rms"), v), length * std::sqrt(11.0), 1e-5);
  dualize(ctx, {.out = v, .g = v, .norm = *find_norm("rms")});
  EXPECT_NEAR(norm(ctx, *find_norm("rms"), v), 1, 1e-6);
}

TEST(Norm, NamesRoundTrip) {
  for (const Norm& norm : matrix_norms()) EXPECT_EQ(find_norm(norm_name(norm)), norm);
  EXPECT_EQ(find_norm("l1-linf"), Norm{NormKind::l1_linf});
  EXPECT_EQ(find_norm("l2-l2"), Norm{NormKind::l2_l2});
  EXPECT_EQ(find_norm("spectral"), Norm{NormKind::l2_l2});
  EXPECT_EQ(find_norm("l2"), Norm{NormKind::frobenius});
  EXPECT_EQ(find_norm("linf"), Norm{NormKind::l1_linf});
  EXPECT_EQ(find_norm("l1-l1.0"), (Norm{NormKind::l1_lp, 1}));
  EXPECT_EQ(norm_name({NormKind::l1_lp, 4.0 / 3}), "l1-l1.3333333333333333");
  for (const char* bad : {"", "-", "l3", "l1-lp", "lp-linf", "l1-l0.5", "l0-linf", "l1-lnan", "l1-linfinity",
                          "l1-l2x", "l1-l", "l2-l3", "linf-l1", "l-1-linf", "l1-l1e999"})
    EXPECT_FALSE(find_norm(bad)) << bad;
}

TEST(Norm, NuclearIsTheDualOfSpectral) {
  CpuContext ctx;
  const Norm nuclear = *find_norm("nuclear"), spectral = *find_norm("l2-l2");
  for (uint32_t seed = 0; seed < 10; ++seed) {
    const Matrix64 g = as<double>(random_matrix(6, 9, seed));
    EXPECT_NEAR(norm_of(ctx, nuclear, g), dual_of(ctx, spectral, g), 1e-12);
    EXPECT_NEAR(dual_of(ctx, nuclear, g), norm_of(ctx, spectral, g), 1e-12);
    Matrix64 top = dualized(ctx, nuclear, g);  // of rank one
    std::vector<double> s(6);
    singular_values(ctx, top.tensor(), s);
    EXPECT_NEAR(s[0], 1, 1e-12);
    EXPECT_NEAR(s[1], 0, 1e-12);
  }
  // A tie: any of the pairs attains the dual norm, and one of them is taken.
  Matrix64 identity(3, 3);
  for (int64_t i = 0; i < 3; ++i) identity(i, i) = 2;
  const Matrix64 d = dualized(ctx, nuclear, identity);
  EXPECT_NEAR(inner(identity, d), 2, 1e-12);
  EXPECT_NEAR(norm_of(ctx, nuclear, d), 1, 1e-12);
}

TEST(Norm, OnHost) {
  const PolarMethod keller = polar_method("keller5"), sketch = polar_method("sketch:rank=2");
  EXPECT_TRUE(on_host(*find_norm("nuclear")));
  EXPECT_TRUE(on_host(*find_norm("rms-rms")));
  EXPECT_TRUE(on_host(*find_norm("rms-rms"), &sketch));
  EXPECT_FALSE(on_host(*find_norm("rms-rms"), &keller));
  EXPECT_TRUE(on_host(*find_norm("nuclear"), &keller));
  for (const char* name : {"frobenius", "l1-linf", "l1-l1", "linf-linf", "l3-linf", "l1-rms"})
    EXPECT_FALSE(on_host(*find_norm(name))) << name;
}

TEST(Modular, ExpectedNumbers) {
  check_modular_numbers<float>(on_cpu, 2e-6);
  check_modular_numbers<double>(on_cpu, 1e-9);
}

TEST(Modular, ScalingTheSensitivities) {  // s -> c s: eta -> eta / c, dW -> dW / c^2
  CpuContext ctx;
  const Matrix a = random_matrix(5, 3, 51), b = random_matrix(2, 6, 52);
  const auto run = [&](double c, double sharpness) {
    Matrix x = a, y = b;
    const ModularTerm terms[] = {{x.tensor(), *find_norm("l1-linf"), 2 * c, false},
                                 {y.tensor(), *find_norm("l2-l2"), 0.5 * c, false}};
    const double eta = steepest_descent(ctx, terms, sharpness);
    return std::tuple{eta, x, y};
  };
  const auto [eta, x, y] = run(1, 4);
  const auto [eta3, x3, y3] = run(3, 4);
  EXPECT_NEAR(eta3 * 3 / eta, 1, 1e-9);
  EXPECT_LT(deviation(scaled(x3, 9), x), 1e-6);
  EXPECT_LT(deviation(scaled(y3, 9), y), 1e-6);
  const auto [eta2, x2, y2] = run(1, 2);  // half the sharpness, twice the step
  EXPECT_NEAR(eta2 / eta, 2, 1e-9);
  EXPECT_LT(deviation(x2, scaled(x, 2)), 1e-6);
  EXPECT_LT(deviation(y2, scaled(y, 2)), 1e-6);
}

// Proposition 7: no other change of the two tensors together has a lower
// <G, dW> + (lambda / 2) max_l (s_l ||dW_l||_l)^2.
TEST(Modular, SteepestDescentIsTheMinimum) {
  CpuContext ctx;
  const double lambda = 3, s[] = {2, 0.5};
  const Norm kinds[] = {*find_norm("l1-rms"), *find_norm("rms-rms")};
  const Matrix g[] = {random_matrix(5, 3, 71), random_matrix(2, 6, 72)};
  const auto q = [&](const Matrix& x, const Matrix& y) {
    const double size = std::max(s[0] * norm_of(ctx, kinds[0], x), s[1] * norm_of(ctx, kinds[1], y));
    return inner(g[0], x) + inner(g[1], y) + lambda / 2 * size * size;
  };
  Matrix best[] = {g[0], g[1]};
  const ModularTerm terms[] = {{best[0].tensor(), kinds[0], s[0], false},
                               {best[1].tensor(), kinds[1], s[1], false}};
  const double dual = modular_dual_norm(ctx, terms);
  steepest_descent(ctx, terms, lambda);
  const double lowest = q(best[0], best[1]);
  EXPECT_NEAR(lowest / (-dual * dual / (2 * lambda)), 1, 1e-5);
  uint32_t seed = 100;
  for (const float size : {1e-3f, 1e-2f, 1e-1f, 1.0f, 10.0f})
    for (int i = 0; i < 80; ++i) {
      Matrix other[] = {best[0], best[1]};
      for (Matrix& m : other) {
        const Matrix change = random_matrix(m.rows, m.cols, seed++, size);
        for (size_t k = 0; k < m.data.size(); ++k) m.data[k] += change.data[k];
      }
      EXPECT_GE(q(other[0], other[1]), lowest - 1e-5 * std::fabs(lowest)) << size;
    }
}

// Proposition 6: for a linear map under square loss, lambda = in / out is a true sharpness in the spectral
// norm, so the step -(out / in) tr(S) U V^T lowers the loss by at least out / (2 in) tr(S)^2, again and
// again.
TEST(Modular, MajorisationOfALinearModel) {
  CpuContext ctx;
  constexpr int64_t kIn = 5, kOut = 3, kSamples = 40;
  Matrix x = random_matrix(kIn, kSamples, 61);
  for (int64_t n = 0; n < kSamples; ++n) {  // unit RMS inputs
    double squares = 0;
    for (int64_t i = 0; i < kIn; ++i) squares += static_cast<double>(x(i, n)) * x(i, n);
    for (int64_t i = 0; i < kIn; ++i) x(i, n) *= static_cast<float>(std::sqrt(kIn / squares));
  }
  const Matrix y = random_matrix(kOut, kSamples, 62);
  const auto residual = [&](const Matrix& w) {
    Matrix r = product(w, x);
    for (size_t i = 0; i < r.data.size(); ++i) r.data[i] -= y.data[i];
    return r;
  };
  const auto loss = [&](const Matrix& w) {
    return inner(residual(w), residual(w)) / (2.0 * kSamples * kOut);
  };
  const auto gradient = [&](const Matrix& w) {
    return scaled(product(residual(w), x.transposed()), 1.0 / (kSamples * kOut));
  };
  Matrix w = random_matrix(kOut, kIn, 63);
  const Matrix g = gradient(w);
  for (uint32_t seed = 0; seed < 300; ++seed) {
    const Matrix step =
        random_matrix(kOut, kIn, 1000 + seed, std::pow(10.0f, static_cast<float>(seed % 5) - 3));
    Matrix moved = w;
    for (size_t i = 0; i < moved.data.size(); ++i) moved.data[i] += step.data[i];
    const double spectral = norm_of(ctx, *find_norm("l2-l2"), step);
    EXPECT_LE(loss(moved), (loss(w) + inner(g, step) + 0.5 * kIn / kOut * spectral * spectral) * (1 + 1e-5));
  }
  double last = loss(w);
  for (int step = 0; step < 200; ++step) {
    Matrix dw = gradient(w);
    const double dual = dual_of(ctx, *find_norm("rms-rms"), dw);
    const ModularTerm term[] = {{dw.tensor(), *find_norm("rms-rms"), 1, false}};
    steepest_descent(ctx, term, /*sharpness=*/1);  // lambda = 1 under RMS->RMS
    for (size_t i = 0; i < w.data.size(); ++i) w.data[i] += dw.data[i];
    EXPECT_LE(loss(w), last - dual * dual / 2 + 1e-6 * last);
    last = loss(w);
  }
}
