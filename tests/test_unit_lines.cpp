// Lines of one length, and the sums of an escape velocity: moved in one pass as in two, bit for bit, for any
// number of threads, and what is special: NaN, infinity, denormals. On both devices.
#include "optim/unit_lines.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "optim/escape_sums.h"
#include "tests/op_run.h"

namespace {
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr Lines kBoth[] = {Lines::rows, Lines::columns};

/// The tensors of one call.
struct Operands {
  Tensor g, u, w, copy, guard;

  Operands(Context& ctx, const Shape& shape, DType dtype, double guard_value = 1) : arena_("test") {
    for (Tensor* tensor : {&g, &u, &w}) arena_.add(tensor, dtype, shape);
    arena_.add(&copy, DType::bf16, shape);
    arena_.add(&guard, {1});
    arena_.allocate(ctx);
    ctx.scratch.reserve(std::max(unit_lines_scratch_bytes(shape[0], shape[1], Lines::rows, dtype),
                                 unit_lines_scratch_bytes(shape[0], shape[1], Lines::columns, dtype)) +
                        whole_scratch_bytes());
    std::mt19937_64 random(7);
    for (const Tensor& tensor : {g, u, w, copy}) {
      std::vector<double> values(static_cast<size_t>(tensor.size()));
      for (double& value : values) value = std::normal_distribution<double>()(random);
      put(ctx, tensor, values);
    }
    put(ctx, guard, {guard_value});
  }
  ApplyTo into(bool copies) const {
    return {.w = w,
            .copy = copies ? copy : Tensor{},
            .step = 0.1,
            .decay = 0.01,
            .cautious = copies,
            .guard = guard};
  }
  /// w, copy and u.
  std::vector<std::vector<double>> values(Context& ctx) const {
    return {get(ctx, w), get(ctx, copy), get(ctx, u)};
  }

 private:
  Arena arena_;
};

class UnitLinesOn : public testing::TestWithParam<Where> {
 protected:
  UnitLinesOn() { use(ctx, 2); }
  static void use(Context& ctx, int threads) {
    GetParam() == Where::gpu ? use_gpu(ctx, 0, DType::f32) : use_cpu(ctx, threads);
  }
  Context ctx;
};

TEST_P(UnitLinesOn, MovesAWeightAsApplyUpdateDoes) {
  for (const Shape& shape : {Shape{6, 32}, Shape{5, 33}, Shape{1, 70004}, Shape{40, 1030}})
    for (const DType dtype : {DType::f32, DType::f64})
      for (const Lines lines : kBoth)
        for (const bool copies : {false, true}) {
          if (lines == Lines::columns && shape[1] > 60000) continue;  // long rows are what it is for
          SCOPED_TRACE(shape.str() + dtype_name(dtype) + (lines == Lines::rows ? " rows" : " columns"));
          const Operands apart(ctx, shape, dtype), fused(ctx, shape, dtype);
          unit_lines(ctx, {.u = apart.u, .g = apart.g, .lines = lines, .factor = 3});
          const ApplyTo how = apart.into(copies);
          apply_update(ctx, {.w = how.w,
                             .u = apart.u,
                             .copy = how.copy,
                             .step = how.step,
                             .decay = how.decay,
                             .cautious = how.cautious});
          UnitLines both{.g = fused.g, .lines = lines, .factor = 3, .into = fused.into(copies)};
          if (copies) both.u = fused.u;
          unit_lines(ctx, both);
          const auto want = apart.values(ctx), got = fused.values(ctx);
          EXPECT_EQ(got[0], want[0]);
          EXPECT_EQ(got[1], want[1]);
          if (copies) {
            EXPECT_EQ(got[2], want[2]);
          }
        }
}

TEST_P(UnitLinesOn, AGuardThatIsNaNWritesNothing) {
  for (const Shape& shape : {Shape{5, 33}, Shape{1, 70004}})
    for (const Lines lines : kBoth) {
      const Operands o(ctx, shape, DType::f32, kNaN);
      const auto before = o.values(ctx);
      unit_lines(ctx, {.u = o.u, .g = o.g, .lines = lines, .into = o.into(true)});
      EXPECT_EQ(o.values(ctx), before);
    }
}

TEST_P(UnitLinesOn, TheSameForAnyNumberOfThreads) {
  for (const Shape& shape : {Shape{600, 260}, Shape{2, 200003}}) {
    const bool long_rows = shape[1] > 60000;
    std::vector<std::vector<std::vector<double>>> all;
    std::vector<double> sums;
    for (const int threads : {1, 2, 3}) {
      use(ctx, threads);
      for (const Lines lines : kBoth) {
        const Operands o(ctx, long_rows && lines == Lines::columns ? Shape{40, 1030} : shape, DType::f32);
        unit_lines(ctx, {.u = o.u, .g = o.g, .lines = lines, .into = o.into(true)});
        all.push_back(o.values(ctx));
        const Measured found = escape_sums(ctx, {.g = o.g, .w = o.w, .start = o.g, .s = o.u, .beta = 0.5});
        sums.insert(sums.end(), {found.along, found.dual});
      }
    }
    for (size_t i = 2; i < all.size(); ++i) EXPECT_EQ(all[i], all[i - 2]);
    for (size_t i = 4; i < sums.size(); ++i) EXPECT_EQ(sums[i], sums[i - 4]);
  }
}

TEST_P(UnitLinesOn, SpecialLines) {
  for (const int64_t length : {9, 70001})
    for (const bool by_rows : {true, false}) {
      if (!by_rows && length > 9) continue;
      const int64_t lines = 5;
      const Operands o(ctx, by_rows ? Shape{lines, length} : Shape{length, lines}, DType::f32);
      const auto at = [=](int64_t line, int64_t i) {
        return static_cast<size_t>(by_rows ? line * length + i : i * lines + line);
      };
      std::vector<double> g(static_cast<size_t>(lines * length), 0.0);  // line 0: zeros
      g[at(1, 3)] = kNaN, g[at(2, 3)] = kInfinity;
      for (int64_t i = 0; i < length; ++i) g[at(3, i)] = 1e-40, g[at(4, i)] = -1e30;
      put(ctx, o.g, g);
      unit_lines(ctx, {.u = o.u, .g = o.g, .lines = by_rows ? Lines::rows : Lines::columns, .factor = 2});
      const std::vector<double> u = get(ctx, o.u);
      const double each = 2 / std::sqrt(static_cast<double>(length));
      for (int64_t i = 0; i < length; ++i) {
        ASSERT_EQ(u[at(0, i)], 0);
        ASSERT_TRUE(std::isnan(u[at(1, i)]));
        ASSERT_TRUE(i == 3 ? std::isnan(u[at(2, i)]) : u[at(2, i)] == 0);
        ASSERT_NEAR(u[at(3, i)] / each, 1, 1e-4);  // denormals have few bits
        ASSERT_NEAR(u[at(4, i)] / each, -1, 1e-6);
      }
    }
}

TEST_P(UnitLinesOn, WrongOperandsAreErrors) {
  const Operands o(ctx, {6, 8}, DType::f32), wide(ctx, {6, 8}, DType::f64), small(ctx, {3, 8}, DType::f32);
  EXPECT_THROW(unit_lines(ctx, {.u = wide.u, .g = o.g, .lines = Lines::rows}), ShapeError);
  EXPECT_THROW(unit_lines(ctx, {.u = small.u, .g = o.g, .lines = Lines::rows}), ShapeError);
  EXPECT_THROW(unit_lines(ctx, {.g = o.g, .lines = Lines::rows, .into = {.w = wide.w}}), ShapeError);
  EXPECT_THROW(unit_lines(ctx, {.g = o.g, .lines = Lines::rows, .into = {.w = small.w}}), ShapeError);
  EXPECT_THROW(unit_lines(ctx, {.g = o.g, .lines = Lines::rows, .into = {.copy = o.copy}}), ShapeError);
  EXPECT_THROW(unit_lines(ctx, {.u = o.u, .g = o.g.view({48}), .lines = Lines::rows}), ShapeError);
  EXPECT_THROW(escape_sums(ctx, {.g = o.g, .w = small.w, .start = o.u}), ShapeError);
  EXPECT_THROW(escape_sums(ctx, {.g = o.g, .w = o.w, .start = wide.u}), ShapeError);
  EXPECT_THROW(escape_sums(ctx, {.g = o.g, .w = o.w, .start = {}}), ShapeError);
  const auto then = [&](const Tensor& g, const Tensor& w) {
    const AdamDirection step{.g = g, .beta1 = 0, .beta2 = 0, .eps = 1, .into = {.w = w}};
    escape_sums(ctx, {.g = o.g, .w = o.w, .start = o.u, .then = &step});
  };
  EXPECT_THROW(then(o.u, o.w), ShapeError);
  EXPECT_THROW(then(o.g, o.u), ShapeError);
  EXPECT_THROW(unit_lines(ctx, {.u = o.u, .g = o.g, .lines = Lines::rows, .norms = o.w}), ShapeError);
  EXPECT_THROW(
      unit_lines(ctx, {.u = o.u, .g = o.g, .lines = Lines::rows, .norms = wide.w.view({48}).slice(0, 6)}),
      ShapeError);
}

// Sums and the step of Adam in one pass: the bits of one after the other.
TEST_P(UnitLinesOn, AStepAfterItsSums) {
  for (const DType dtype : {DType::f32, DType::f64})
    for (const bool copies : {false, true})
      for (const double guard : {1.0, kNaN}) {
        const Shape shape{3, 5001};
        const Operands apart(ctx, shape, dtype, guard), fused(ctx, shape, dtype, guard);
        const Operands states[] = {{ctx, shape, dtype}, {ctx, shape, dtype}};
        Measured found[2];
        for (const int k : {0, 1}) {
          const Operands& o = k == 0 ? apart : fused;
          const AdamDirection step{.m = states[k].w,
                                   .g = o.g,
                                   .beta1 = 0.9,
                                   .beta2 = 0,
                                   .eps = 0.1,
                                   .gain = 1.5,
                                   .into = o.into(copies)};
          EscapeSums sums{.g = o.g, .w = o.w, .start = states[k].g, .s = states[k].u, .beta = 0.5};
          if (k == 1) sums.then = &step;
          found[k] = escape_sums(ctx, sums);
          if (k == 0) adam_direction(ctx, step);
        }
        EXPECT_EQ(found[0].along, found[1].along);
        EXPECT_EQ(found[0].dual, found[1].dual);
        EXPECT_EQ(apart.values(ctx), fused.values(ctx));
        EXPECT_EQ(states[0].values(ctx), states[1].values(ctx));
      }
}

TEST_P(UnitLinesOn, ANaNReachesTheSums) {
  const Operands o(ctx, {7, 300}, DType::f32);
  std::vector<double> g = get(ctx, o.g);
  g[1234] = kNaN;
  put(ctx, o.g, g);
  const Measured found = escape_sums(ctx, {.g = o.g, .w = o.w, .start = o.u, .s = o.u.view({2100})});
  EXPECT_TRUE(std::isnan(found.along));
  EXPECT_TRUE(std::isnan(found.dual));
}

INSTANTIATE_TEST_SUITE_P(Devices, UnitLinesOn,
                         kHaveGpu ? testing::Values(Where::cpu, Where::gpu)
                                  : testing::Values(Where::cpu, Where::cpu),
                         [](const auto& info) { return std::string(info.index == 0 ? "cpu" : "gpu"); });
}  // namespace
