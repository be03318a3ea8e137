// Rows and columns on both devices: what the table of cases (cases/lines.h) cannot express.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "tests/cases/lines.h"
#include "tests/op_run.h"
#include "tests/optim_golden.h"

namespace {
constexpr double kInf = std::numeric_limits<double>::infinity(),
                 kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kExponents[] = {1, 1.25, 1.5, 2, 3, 7.5, kInf};

/// q and p with 1 / p + 1 / q = 1.
double conjugate(double q) {
  return q == 1 ? kInf : std::isinf(q) ? 1 : q / (q - 1);
}

using Numbers = std::vector<double>;

/// A matrix of four lines of seven entries, and the same lines as columns.
struct FourLines {
  static constexpr int64_t kCount = 4, kLength = 7;
  Numbers x = random();  // line after line
  DType dtype = DType::f32;
  Lines lines = Lines::rows;

  static Numbers random() {
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    Numbers x(kCount * kLength);
    for (double& value : x) value = normal(random);
    return x;
  }
  double& at(int64_t line, int64_t i) { return x.at(static_cast<size_t>(line * kLength + i)); }
  static Numbers line(const Numbers& all, int64_t index) {
    return {all.begin() + index * kLength, all.begin() + (index + 1) * kLength};
  }
  Shape shape() const { return lines == Lines::rows ? Shape{kCount, kLength} : Shape{kLength, kCount}; }
  /// From line after line to how the matrix is stored, and back.
  Numbers reordered(const Numbers& from, bool to_storage) const {
    if (lines == Lines::rows) return from;
    Numbers to(from.size());
    for (int64_t l = 0; l < kCount; ++l)
      for (int64_t i = 0; i < kLength; ++i) {
        const auto by_line = static_cast<size_t>(l * kLength + i),
                   stored = static_cast<size_t>(i * kCount + l);
        to[to_storage ? stored : by_line] = from[to_storage ? by_line : stored];
      }
    return to;
  }
  Numbers norms(Context& ctx, double q) const {
    Arena arena("lines");
    Tensor x, norms;
    arena.add(&x, dtype, shape());
    arena.add(&norms, dtype, {kCount});
    arena.allocate(ctx);
    put(ctx, x, reordered(this->x, true));
    line_norms(ctx, {.norms = norms, .x = x, .lines = lines, .q = q});
    return get(ctx, norms);
  }
  Numbers duals(Context& ctx, double q, double factor = 1) const {
    Arena arena("lines");
    Tensor x;
    arena.add(&x, dtype, shape());
    arena.allocate(ctx);
    put(ctx, x, reordered(this->x, true));
    line_duals(ctx, {.y = x, .x = x, .lines = lines, .q = q, .factor = factor});
    return reordered(get(ctx, x), false);
  }
};

/// Calls body(ctx, lines, dtype, q) for all there are, on every device of this binary.
template <typename Body>
void everywhere(const Body& body) {
  std::vector<UseDevice> devices{on_cpu};
  if constexpr (kHaveGpu) devices.push_back([](Context& ctx) { use_gpu(ctx, 0, DType::f32); });
  for (const UseDevice use : devices)
    for (const Lines lines : {Lines::rows, Lines::columns})
      for (const DType dtype : {DType::f32, DType::f64})
        for (const double q : kExponents) {
          Context ctx;
          use(ctx);
          SCOPED_TRACE(testing::Message()
                       << (ctx.where == Where::cpu ? "cpu" : "gpu") << " "
                       << (lines == Lines::rows ? "rows " : "columns ") << dtype_name(dtype) << " q=" << q);
          FourLines matrix;
          matrix.lines = lines;
          matrix.dtype = dtype;
          body(ctx, matrix, q);
        }
}

double accuracy(const FourLines& matrix) {
  return matrix.dtype == DType::f64 ? 1e-13 : 1e-6;
}
}  // namespace

TEST(Lines, DualsHaveUnitNormAndAttainTheNorm) {
  everywhere([](Context& ctx, const FourLines& matrix, double q) {
    const Numbers norms = matrix.norms(ctx, q), duals = matrix.duals(ctx, q);
    FourLines dual = matrix;
    dual.x = duals;
    const Numbers dual_norms = dual.norms(ctx, conjugate(q));
    for (int64_t l = 0; l < FourLines::kCount; ++l) {
      const double attained = sum_of_products(FourLines::line(matrix.x, l), FourLines::line(duals, l));
      EXPECT_NEAR(attained / norms[static_cast<size_t>(l)], 1, accuracy(matrix));
      EXPECT_NEAR(dual_norms[static_cast<size_t>(l)], 1, accuracy(matrix));
    }
  });
}

TEST(Lines, ZerosNaNsAndInfinitiesStayInTheirLines) {
  everywhere([](Context& ctx, FourLines matrix, double q) {
    const Numbers clean = matrix.duals(ctx, q);
    for (int64_t i = 0; i < FourLines::kLength; ++i) matrix.at(0, i) = 0;
    for (const double bad : {kNaN, kInf, -kInf}) {
      for (const int64_t where : {int64_t{0}, FourLines::kLength - 1}) {
        FourLines poisoned = matrix;
        poisoned.at(2, where) = bad;
        const Numbers norms = poisoned.norms(ctx, q), duals = poisoned.duals(ctx, q);
        EXPECT_EQ(norms[0], 0);
        EXPECT_EQ(std::isnan(bad) ? std::isnan(norms[2]) : norms[2] == kInf, true)
            << bad << " to " << norms[2];
        for (int64_t i = 0; i < FourLines::kLength; ++i) {
          EXPECT_EQ(FourLines::line(duals, 0)[static_cast<size_t>(i)], 0);
          EXPECT_TRUE(std::isnan(FourLines::line(duals, 2)[static_cast<size_t>(i)])) << bad << " at " << i;
        }
        for (const int64_t l : {1, 3}) EXPECT_EQ(FourLines::line(duals, l), FourLines::line(clean, l));
      }
    }
  });
}

// By a power of two, so that the lines have the same digits.
TEST(Lines, TinyAndHugeEntriesNeitherVanishNorOverflow) {
  everywhere([](Context& ctx, const FourLines& matrix, double q) {
    const Numbers norms = matrix.norms(ctx, q), duals = matrix.duals(ctx, q);
    const bool wide = matrix.dtype == DType::f64;
    for (const int shift : {wide ? -1000 : -66, wide ? 1000 : 100}) {  // 2^-66 and 2^100: 1e-20 and 1e30
      FourLines scaled = matrix;
      for (double& x : scaled.x) x = std::ldexp(x, shift);
      const Numbers scaled_norms = scaled.norms(ctx, q);
      for (size_t l = 0; l < FourLines::kCount; ++l)
        EXPECT_EQ(scaled_norms[l], std::ldexp(norms[l], shift)) << shift;
      EXPECT_EQ(scaled.duals(ctx, q), duals) << shift;
    }
  });
}

// With a ratio of entries that no power would survive.
TEST(Lines, SignsComeFromTheEntriesThemselves) {
  everywhere([](Context& ctx, FourLines matrix, double q) {
    if (q != 1) return;
    const bool wide = matrix.dtype == DType::f64;
    matrix.at(1, 0) = wide ? 1e300 : 1e38f, matrix.at(1, 1) = wide ? -1e-300 : -1e-38f, matrix.at(1, 2) = 0;
    const Numbers signs = FourLines::line(matrix.duals(ctx, q, -3), 1);
    EXPECT_EQ(signs[0], -3);
    EXPECT_EQ(signs[1], 3);
    EXPECT_EQ(signs[2], 0);
  });
}

TEST(Lines, TheFirstOfTheLargestTakesAll) {
  everywhere([](Context& ctx, FourLines matrix, double q) {
    if (!std::isinf(q)) return;
    matrix.at(3, 2) = -9, matrix.at(3, 5) = 9;
    EXPECT_EQ(FourLines::line(matrix.duals(ctx, q, 0.5), 3), (Numbers{0, 0, -0.5, 0, 0, 0, 0}));
  });
}

TEST(Lines, ResultsDoNotDependOnTheNumberOfThreads) {
  for (const Lines lines : {Lines::rows, Lines::columns})
    for (const Exponent q : {Exponent{1, 1}, {4, 3}, {2, 1}, {1, 0}})
      for (const OpCase& op_case :
           {line_norms_case({2, 300, 517, lines, q}), line_duals_case({2, 300, 517, lines, q})}) {
        const Values before = random_values(op_case);
        CpuContext one(1, 0), seven(7, 0);
        EXPECT_EQ(run(one, op_case, before), run(seven, op_case, before)) << op_case.name;
      }
}

TEST(Lines, EmptyMatricesAndEmptyLines) {
  CpuContext ctx;
  std::vector<float> norms{7, 7, 7};
  Tensor empty(norms.data(), Shape{3, 0});
  line_norms(ctx, {.norms = {norms.data(), {3}}, .x = empty, .lines = Lines::rows, .q = 3});
  EXPECT_EQ(norms, (std::vector<float>{0, 0, 0}));
  line_duals(ctx, {.y = empty, .x = empty, .lines = Lines::columns, .q = kInf});
}

TEST(Lines, WrongArgumentsAreErrors) {
  CpuContext ctx;
  Matrix x = random_matrix(4, 3, 1), y = x;
  std::vector<float> norms(4);
  std::vector<double> wide(4);
  const Tensor four(norms.data(), Shape{4}), three(norms.data(), Shape{3});
  line_norms(ctx, {.norms = four, .x = x.tensor(), .lines = Lines::rows, .q = 1});
  for (const double q : {0.5, -kInf, kNaN})
    EXPECT_THROW(line_norms(ctx, {.norms = four, .x = x.tensor(), .lines = Lines::rows, .q = q}), ShapeError);
  EXPECT_THROW(line_norms(ctx, {.norms = three, .x = x.tensor(), .lines = Lines::rows, .q = 1}), ShapeError);
  EXPECT_THROW(line_norms(ctx, {.norms = {wide.data(), {4}}, .x = x.tensor(), .lines = Lines::rows, .q = 1}),
               ShapeError);
  EXPECT_THROW(line_norms(ctx, {.norms = four, .x = four, .lines = Lines::rows, .q = 1}), ShapeError);
  EXPECT_THROW(line_duals(ctx, {.y = four, .x = x.tensor(), .lines = Lines::rows, .q = 1}), ShapeError);
}
