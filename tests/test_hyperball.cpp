// Steps over a sphere: moved in one pass as in two, bit for bit, and what is special. On both devices. The
// formula itself is a case of the table of operations (tests/cases/hyperball.h).
#include "optim/hyperball.h"

#include <gtest/gtest.h>

#include <limits>

#include "tests/op_run.h"
#include "tests/optim_fixture.h"

namespace {
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// One weight and its direction.
template <typename T>
struct Ball {
  Ball(Context& ctx, const MatrixOf<T>& w_values, const MatrixOf<T>& u_values, double radius_value = 3)
      : w(ctx, w_values), u(ctx, u_values), radius(ctx, MatrixOf<T>(1, 1)), arena("test") {
    arena.add(&guard, {1});
    arena.add(&copy, DType::bf16, w.tensor().shape);
    arena.allocate(ctx);
    MatrixOf<T> r(1, 1);
    r(0, 0) = static_cast<T>(radius_value);
    upload(ctx, radius.tensor(), r);
    ctx.scratch.reserve(hyperball_scratch_bytes(ctx, std::vector<int64_t>{w.tensor().size()}));
  }
  Hyperball args(double lr = 0.25) {
    return {.u = u.tensor(), .w = w.tensor(), .radius = radius.tensor().view({1}), .lr = lr};
  }
  ThereOf<T> w, u, radius;
  Tensor guard, copy;
  Arena arena;
};
template <typename T>
double size_of(const MatrixOf<T>& m) {
  return std::sqrt(inner(m, m));
}
void step(Context& ctx, const Hyperball& args) {
  hyperball(ctx, {&args, 1});
}
template <typename Body>
void on_both(Body&& body) {
  for (const UseDevice use : both_devices()) {
    Context ctx;
    use(ctx);
    body(ctx);
  }
}
}  // namespace

TEST(Hyperball, MovesAWeightAsApplyUpdateDoes) {
  on_both([](Context& ctx) {
    for (const int64_t cols : {33, 3001}) {
      const Matrix w = random_matrix(7, cols, 1), u = random_matrix(7, cols, 2);
      Ball<float> apart(ctx, w, u), fused(ctx, w, u);
      step(ctx, apart.args());
      ApplyUpdate update{
          .w = apart.w.tensor(), .u = apart.u.tensor(), .copy = apart.copy, .step = 0.25, .decay = 0.01};
      apply_update(ctx, update);
      Hyperball args = fused.args();
      args.into = {.w = fused.w.tensor(), .copy = fused.copy, .step = 0.25, .decay = 0.01};
      step(ctx, args);
      EXPECT_EQ(fused.w.here().data, apart.w.here().data);
      EXPECT_EQ(get(ctx, fused.copy), get(ctx, apart.copy));
    }
  });
}

TEST(Hyperball, SpecialDirections) {
  on_both([](Context& ctx) {
    const Matrix64 w = as<double>(random_matrix(6, 9, 1)), u = as<double>(random_matrix(6, 9, 2));
    for (const double size : {1e-40, 1e-20, 1.0, 1e20, 1e37}) {  // its length does not matter
      Ball<float> ball(ctx, as<float>(w), as<float>(scaled(u, size)));
      Hyperball args = ball.args();
      args.into = {.w = ball.w.tensor(), .step = args.lr};
      step(ctx, args);
      EXPECT_NEAR(size_of(ball.w.here()), 3, 1e-5) << size;
      EXPECT_GT(deviation(ball.w.here(), as<float>(w)), 0.1) << size;
    }
    Ball<double> still(ctx, w, Matrix64(6, 9), size_of(w));
    step(ctx, still.args());
    for (const double x : still.u.here().data) EXPECT_NEAR(x, 0, 1e-14);
    Ball<double> zero(ctx, Matrix64(6, 9), Matrix64(6, 9), 0);
    step(ctx, zero.args());
    EXPECT_EQ(zero.u.here().data, Matrix64(6, 9).data);
    Ball<double> through(ctx, w, w, size_of(w));  // to the centre, from where no way leads back
    step(ctx, through.args(1));
    for (size_t i = 0; i < w.data.size(); ++i) EXPECT_TRUE(std::isfinite(through.u.here().data[i]));
    for (const bool in_w : {false, true}) {
      Matrix64 bad = in_w ? w : u;
      bad(2, 3) = kNaN;
      Ball<double> ball(ctx, in_w ? bad : w, in_w ? u : bad);
      step(ctx, ball.args());
      for (const double x : ball.u.here().data) EXPECT_TRUE(std::isnan(x));
    }
  });
}

TEST(Hyperball, GuardsAndStepsOfNoLength) {
  on_both([](Context& ctx) {
    const Matrix w = random_matrix(5, 8, 1), u = random_matrix(5, 8, 2);
    for (const bool guarded : {false, true}) {
      Ball<float> ball(ctx, w, u);
      Hyperball args = ball.args(guarded ? 0.25 : 0);
      args.first = true;
      args.into = {
          .w = ball.w.tensor(), .copy = ball.copy, .step = args.lr, .guard = guarded ? ball.guard : Tensor{}};
      if (guarded) put(ctx, ball.guard, {kNaN});
      const std::vector<double> copy = get(ctx, ball.copy);
      step(ctx, args);
      EXPECT_EQ(ball.w.here().data, w.data);
      EXPECT_EQ(ball.u.here().data, u.data);
      EXPECT_EQ(get(ctx, ball.copy), copy);
      EXPECT_NEAR(ball.radius.here()(0, 0), size_of(w), 1e-6);  // of the weight, which is good
    }
  });
}

TEST(Hyperball, TheSameForAnyNumberOfThreads) {
  std::vector<std::vector<float>> all;
  for (const int threads : {1, 2, 3}) {
    Context ctx;
    use_cpu(ctx, threads);
    Ball<float> ball(ctx, random_matrix(60, 3001, 1), random_matrix(60, 3001, 2));
    step(ctx, ball.args());
    all.push_back(ball.u.here().data);
  }
  EXPECT_EQ(all[1], all[0]);
  EXPECT_EQ(all[2], all[0]);
}

TEST(Hyperball, WrongOperandsAreErrors) {
  Context ctx;
  use_cpu(ctx, 1);
  Ball<float> ball(ctx, Matrix(2, 3), Matrix(2, 3)), other(ctx, Matrix(2, 4), Matrix(2, 4));
  Ball<double> wide(ctx, Matrix64(2, 3), Matrix64(2, 3));
  const auto with = [&](const Tensor& u, const Tensor& radius, const Tensor& moved) {
    Hyperball args = ball.args();
    args.u = u, args.radius = radius, args.into.w = moved;
    EXPECT_THROW(step(ctx, args), ShapeError);
  };
  const Tensor u = ball.u.tensor(), radius = ball.radius.tensor().view({1});
  with(other.u.tensor(), radius, {});
  with(wide.u.tensor(), radius, {});
  with(u, wide.radius.tensor().view({1}), {});
  with(u, u.view({6}), {});
  with(u, radius, other.w.tensor());
}
