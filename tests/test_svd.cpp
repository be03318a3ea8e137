// LAPACK's decomposition of float64 matrices, on both devices; float32 is in test_polar.cpp.
#include "optim/svd.h"

#include "tests/op_run.h"

namespace {
void check(Context& ctx) {
  // A rotation times diag(3, 1e-9) times a rotation: float32 could not tell the second value from noise.
  const double c = 0.6, s = 0.8;
  const std::vector<double> w{3 * c * c - 1e-9 * s * s, 3 * c * s + 1e-9 * s * c, -3 * s * c - 1e-9 * c * s,
                              -3 * s * s + 1e-9 * c * c};
  const std::vector<double> polar{c * c - s * s, 2 * c * s, -2 * c * s, c * c - s * s};
  ctx.scratch.reserve(svd_scratch_bytes(ctx, 2, 2));
  Arena arena("test");
  Tensor x;
  arena.add(&x, DType::f64, {2, 2});
  arena.allocate(ctx);
  put(ctx, x, w);
  std::array<double, 2> values{};
  singular_values(ctx, x, values);
  EXPECT_NEAR(values[0], 3, 1e-14);
  EXPECT_NEAR(values[1], 1e-9, 1e-15);
  EXPECT_NEAR(svd_polar(ctx, x), 3 + 1e-9, 1e-14);
  const std::vector<double> got = get(ctx, x);
  for (size_t i = 0; i < 4; ++i) EXPECT_NEAR(got[i], polar[i], 1e-6) << i;  // 1e-15 / 1e-9
  put(ctx, x, {1, std::nan(""), 0, 1});
  EXPECT_TRUE(std::isnan(svd_polar(ctx, x)));
  for (const double value : get(ctx, x)) EXPECT_TRUE(std::isnan(value));
}

TEST(Svd, DecomposesFloat64) {
  Context cpu;
  use_cpu(cpu, 1);
  check(cpu);
  if constexpr (kHaveGpu) {
    Context gpu;
    use_gpu(gpu, 0, DType::f32);
    check(gpu);
  }
}
}  // namespace
