// Extreme singular values by Lanczos against LAPACK, on every device of this binary.
#include "optim/lanczos.h"

#include <gtest/gtest.h>
#include <omp.h>

#include "optim/svd.h"
#include "tests/optim_golden.h"

namespace {
class Lanczos : public testing::TestWithParam<Where> {
 protected:
  Lanczos() {
    GetParam() == Where::cpu ? use_cpu(ctx_, 2) : use_gpu(ctx_, 0, DType::f32);
    use_cpu(host_, 2);
    host_.scratch.reserve(int64_t{64} << 20);
    ctx_.scratch.reserve(int64_t{1} << 20);
  }
  SingularBand band(const Matrix& m, int steps = 32) {
    ctx_.scratch.reserve(lanczos_scratch_bytes(m.rows, m.cols, steps));
    Tensor a;
    Arena arena("test");
    arena.add(&a, {m.rows, m.cols});
    arena.allocate(ctx_);
    upload(ctx_, a, m);
    return lanczos_band(ctx_, a, steps);
  }
  SingularBand exact(Matrix m) {
    std::vector<double> values(static_cast<size_t>(std::min(m.rows, m.cols)));
    singular_values(host_, m.tensor(), values);
    return {values.back(), values.front()};
  }
  Context ctx_, host_;
};
INSTANTIATE_TEST_SUITE_P(On, Lanczos,
                         testing::ValuesIn(kHaveGpu ? std::vector{Where::cpu, Where::gpu}
                                                    : std::vector{Where::cpu}),
                         [](const auto& info) { return info.param == Where::cpu ? "Cpu" : "Gpu"; });
}  // namespace

TEST_P(Lanczos, RandomMatrices) {
  uint32_t seed = 0;
  for (const auto& [rows, cols] :
       std::vector<std::pair<int64_t, int64_t>>{{200, 200}, {300, 150}, {130, 390}, {450, 450}}) {
    const Matrix m = random_matrix(rows, cols, ++seed);
    const SingularBand found = band(m), want = exact(m);
    EXPECT_NEAR(found.high / want.high, 1, 1e-3) << rows << " x " << cols;
    EXPECT_LE(found.high, want.high * (1 + 1e-6));
    EXPECT_GE(found.low, want.low * (1 - 1e-4));
  }
}

TEST_P(Lanczos, AsManyStepsAsTheSmallerSideAreExact) {
  for (const auto& [rows, cols] :
       std::vector<std::pair<int64_t, int64_t>>{{16, 16}, {33, 9}, {5, 40}, {1, 7}}) {
    const Matrix m = random_matrix(rows, cols, 5);
    const SingularBand found = band(m, 40), want = exact(m);
    EXPECT_NEAR(found.high / want.high, 1, 1e-5) << rows << " x " << cols;
    EXPECT_NEAR(found.low / want.high, want.low / want.high, 1e-5) << rows << " x " << cols;
  }
}

TEST_P(Lanczos, NarrowBandsAreFoundWhole) {  // what Newton-Schulz leaves: values in [0.7, 1.2]
  Matrix m = random_matrix(150, 200, 3);
  svd_polar(host_, m.tensor());
  const Matrix factor = m;
  for (int64_t i = 0; i < m.rows; ++i)
    for (int64_t j = 0; j < m.cols; ++j)
      m(i, j) *= 0.7f + 0.5f * static_cast<float>(i) / static_cast<float>(m.rows - 1);
  const SingularBand found = band(m), want = exact(m), one = band(factor);
  EXPECT_NEAR(found.low / want.low, 1, 0.01);
  EXPECT_NEAR(found.high / want.high, 1, 2e-3);
  EXPECT_NEAR(one.low, 1, 1e-5);
  EXPECT_NEAR(one.high, 1, 1e-5);
}

TEST_P(Lanczos, LowRankZeroScaleAndNaN) {
  const Matrix thin = random_matrix(140, 3, 1);
  const Matrix low = product(thin, random_matrix(3, 140, 2));
  const SingularBand found = band(low), want = exact(low);
  EXPECT_NEAR(found.high / want.high, 1, 1e-5);
  EXPECT_LT(found.low, 1e-5 * want.high);
  const SingularBand zero = band(Matrix(20, 30));
  EXPECT_EQ(zero.high, 0);
  EXPECT_EQ(zero.low, 0);
  const Matrix m = random_matrix(40, 30, 4);
  EXPECT_NEAR(band(scaled(m, 1e-20)).high * 1e20 / band(m).high, 1, 1e-5);
  Matrix bad = m;
  bad(7, 11) = std::nanf("");
  EXPECT_TRUE(std::isnan(band(bad).high));
  EXPECT_TRUE(std::isnan(band(bad).low));
}

TEST_P(Lanczos, SameBitsEveryTime) {
  const Matrix m = random_matrix(70, 90, 6);
  const SingularBand a = band(m, 10), b = band(m, 10);
  EXPECT_EQ(a.low, b.low);
  EXPECT_EQ(a.high, b.high);
}

// Or what comes after it would have other bits than without it, and take longer.
TEST_P(Lanczos, LeavesOpenMPItsThreads) {
  const int threads = use_threads(2);
  band(random_matrix(20, 30, 6));
  EXPECT_EQ(omp_get_max_threads(), threads);
}
