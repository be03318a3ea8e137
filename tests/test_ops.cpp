// Every operation against its float64 oracle, and every gradient against finite differences of that oracle.
#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <random>

#include "model/kernels/simd.h"
#include "tests/cases/all.h"
#include "tests/op_cases.h"
#include "tests/op_run.h"

namespace {
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

/// Runs the case once on the CPU and returns all its tensors afterwards.
Values run(const OpCase& op_case, const Values& values, int threads) {
  Context ctx;
  use_cpu(ctx, threads);
  return run(ctx, op_case, values);
}

void check_values(const OpCase& op_case) {
  const Values before = random_values(op_case);
  Values want = before;
  op_case.oracle(want);
  for (int threads : {1, 2, 5}) {
    const Values got = run(op_case, before, threads);
    expect_outputs(op_case, got, want, op_case.tolerance, std::to_string(threads) + " threads");
    EXPECT_EQ(got, run(op_case, before, threads)) << "not deterministic with " << threads << " threads";
  }
}

/// Central differences with a step at which truncation and rounding of float64 are both about 1e-9.
void check_gradients(const OpCase& op_case) {
  const Values before = random_values(op_case);
  const Values got = run(op_case, before, 2);
  for (const auto& [output, input] : op_case.gradients) {
    const std::vector<double>& gradient = got.at(output);
    const size_t every = 1 + gradient.size() / 50;  // large cases: some elements, evenly spread
    for (size_t i = 0; i < gradient.size() && !testing::Test::HasFailure(); i += every) {
      const double step = 1e-5;
      Values moved = before;
      moved[input][i] += step;
      const double up = op_case.loss(moved);
      moved[input][i] -= 2 * step;
      const double want = (up - op_case.loss(moved)) / (2 * step);
      expect_close("d loss / d " + input + "[" + std::to_string(i) + "]", gradient[i], want,
                   2 * op_case.tolerance * (std::abs(want) + rms(gradient)) + 1e-7);
    }
  }
}

// RegisterTest must be called before main, which is GoogleTest's.
[[maybe_unused]] const bool registered = [] {
  for (const OpCase& op_case : test_cases()) {
    register_case("OpValues", op_case, check_values);
    if (op_case.loss) register_case("OpGradients", op_case, check_gradients);
  }
  return true;
}();

// --------------------------------------------------------------------------------------------- exp_simd

TEST(Simd, ExpIsAccurateOverItsWholeRange) {
  double worst = 0;
  for (float x = -87.0f; x < 88.0f; x += 0.00037f) {
    const double want = std::exp(static_cast<double>(x));
    worst = std::max(worst, std::abs(exp_simd(x) / want - 1));
  }
  EXPECT_LT(worst, 1e-7);
}

TEST(Simd, ExpAtTheEdges) {
  EXPECT_TRUE(std::isnan(exp_simd(kNaN)));
  EXPECT_TRUE(std::isnan(exp_simd(-kNaN)));
  EXPECT_EQ(exp_simd(kInf), kInf);
  EXPECT_EQ(exp_simd(-kInf), 0.0f);
  EXPECT_EQ(exp_simd(1e30f), kInf);
  EXPECT_EQ(exp_simd(-1e30f), 0.0f);
  EXPECT_EQ(exp_simd(0.0f), 1.0f);
  EXPECT_EQ(exp_simd(-0.0f), 1.0f);
  for (float tiny : {1e-45f, -1e-45f, 1e-39f, -1e-39f}) EXPECT_EQ(exp_simd(tiny), 1.0f);
}

// Where the result stops being a normal float, the number is made of bits that mean something else.
TEST(Simd, ExpIsAccurateUpToTheLastFloatOfEitherSide) {
  constexpr double smallest = std::numeric_limits<float>::min(), largest = std::numeric_limits<float>::max();
  for (float start : {-87.34f, 88.72f})
    for (float x = start; x < start + 0.005f; x = std::nextafter(x, kInf)) {
      const double want = std::exp(static_cast<double>(x));
      const float got = exp_simd(x);
      if (want < smallest) {
        ASSERT_TRUE(got == 0.0f || std::abs(got / want - 1) < 1e-5) << x;
      } else if (want > largest) {
        ASSERT_EQ(got, kInf) << x;
      } else {
        ASSERT_NEAR(got / want, 1, 1e-7) << x;
      }
    }
}

TEST(Simd, ExpTurnsNothingButNaNIntoNaN) {
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 4099) {
    const auto x = std::bit_cast<float>(static_cast<uint32_t>(bits));
    ASSERT_EQ(std::isnan(exp_simd(x)), std::isnan(x)) << x;
    ASSERT_FALSE(exp_simd(x) < 0) << x;
  }
}

// The same in vectors as one by one: the compiler may contract a product and a sum in one and not in the
// other, but special values must survive both.
TEST(Simd, VectorsTreatSpecialValuesAsScalarsDo) {
  std::vector<float> x(64, 1.0f), y(64);
  x[3] = kNaN, x[20] = kInf, x[37] = -kInf, x[50] = -100.0f;
#pragma omp simd
  for (int i = 0; i < 64; ++i) y[i] = exp_simd(x[i]);
  EXPECT_TRUE(std::isnan(y[3]));
  EXPECT_EQ(y[20], kInf);
  EXPECT_EQ(y[37], 0.0f);
  EXPECT_EQ(y[50], 0.0f);
  EXPECT_NEAR(y[0], M_E, 1e-6);
}

// ---------------------------------------------------------------------------------- what a table cannot
// express

/// Memory for a test by hand.
struct Floats {
  std::vector<float> memory;
  Shape shape;
  explicit Floats(Shape shape, float value = 0) : memory(shape.size(), value), shape(shape) {}
  Tensor tensor() { return {memory.data(), shape}; }
  float& operator[](size_t i) { return memory[i]; }
};

struct Ops : testing::Test {
  Context ctx;
  Ops() {
    use_cpu(ctx, 2);
    ctx.scratch.reserve(1 << 20);
  }
};

TEST_F(Ops, CrossEntropyNeverReadsThePaddingAndGivesItZeroGradient) {
  Floats logits({2, 128}, 0.5f), losses({2});
  for (size_t n = 0; n < 2; ++n)
    for (size_t v = 65; v < 128; ++v) logits[n * 128 + v] = kNaN;
  std::vector<int32_t> targets{0, 64};
  cross_entropy(ctx, {.losses = losses.tensor(),
                      .logits = logits.tensor(),
                      .targets = {targets.data(), {2}},
                      .V = 65,
                      .grad_scale = 1,
                      .with_gradient = true});
  for (size_t n = 0; n < 2; ++n) {
    EXPECT_NEAR(losses[n], std::log(65.0), 1e-6);
    for (size_t v = 65; v < 128; ++v) EXPECT_EQ(logits[n * 128 + v], 0.0f);
  }
  EXPECT_NEAR(logits[0], 1 / 65.0 - 1, 1e-6);
  EXPECT_NEAR(logits[1], 1 / 65.0, 1e-6);
}

TEST_F(Ops, CrossEntropyShowsNonFiniteLogits) {
  for (bool with_gradient : {false, true})
    for (float bad : {kNaN, kInf})
      for (size_t where : {size_t{0}, size_t{1500}, size_t{2999}}) {
        Floats logits({1, 3000}, 1.0f), losses({1});
        logits[where] = bad;
        std::vector<int32_t> targets{7};
        cross_entropy(ctx, {.losses = losses.tensor(),
                            .logits = logits.tensor(),
                            .targets = {targets.data(), {1}},
                            .V = 3000,
                            .with_gradient = with_gradient});
        EXPECT_FALSE(std::isfinite(losses[0])) << bad << " at " << where;
      }
}

TEST_F(Ops, CrossEntropyTakesMinusInfinityAsProbabilityZero) {
  for (bool with_gradient : {false, true}) {
    Floats logits({1, 3000}, -kInf), losses({1});  // the first blocks hold nothing else
    logits[2500] = logits[2501] = 3.0f;
    std::vector<int32_t> targets{2500};
    cross_entropy(ctx, {.losses = losses.tensor(),
                        .logits = logits.tensor(),
                        .targets = {targets.data(), {1}},
                        .V = 3000,
                        .grad_scale = 1,
                        .with_gradient = with_gradient});
    EXPECT_NEAR(losses[0], std::log(2.0), 1e-6);
    if (with_gradient) {
      EXPECT_EQ(logits[0], 0.0f);
    }
    targets[0] = 0;  // an impossible target
    logits = Floats({1, 3000}, -kInf);
    logits[2500] = 3.0f;
    cross_entropy(ctx, {.losses = losses.tensor(),
                        .logits = logits.tensor(),
                        .targets = {targets.data(), {1}},
                        .V = 3000,
                        .with_gradient = with_gradient});
    EXPECT_EQ(losses[0], kInf);
  }
}

TEST_F(Ops, CrossEntropySurvivesLargeLogits) {
  Floats logits({1, 5}, -3e4f), losses({1});
  logits[2] = 3e4f;
  std::vector<int32_t> targets{1};
  cross_entropy(
      ctx, {.losses = losses.tensor(), .logits = logits.tensor(), .targets = {targets.data(), {1}}, .V = 5});
  EXPECT_EQ(losses[0], 6e4f);
}

TEST_F(Ops, TargetsAndTokensOutsideTheVocabularyAreErrorsBeforeAnythingIsWritten) {
  Floats logits({2, 8}, 1.0f), losses({2}, 9.0f), table({5, 3}), positions({2, 3}), y({1, 2, 3}, 9.0f);
  for (int32_t bad : {-1, 5}) {
    std::vector<int32_t> ids{0, bad};
    EXPECT_THROW(cross_entropy(ctx, {.losses = losses.tensor(),
                                     .logits = logits.tensor(),
                                     .targets = {ids.data(), {2}},
                                     .V = 5,
                                     .with_gradient = true}),
                 ShapeError);
    EXPECT_THROW(embedding_forward(ctx, {.y = y.tensor(),
                                         .tokens = {ids.data(), {1, 2}},
                                         .wte = table.tensor(),
                                         .wpe = positions.tensor()}),
                 ShapeError);
    EXPECT_THROW(embedding_backward(ctx, {.dwte = table.tensor(),
                                          .dwpe = positions.tensor(),
                                          .dy = y.tensor(),
                                          .tokens = {ids.data(), {1, 2}}}),
                 ShapeError);
  }
  EXPECT_EQ(losses[0], 9.0f);
  EXPECT_EQ(logits[0], 1.0f);
  EXPECT_EQ(y[0], 9.0f);
}

TEST_F(Ops, NonFiniteInputsReachEveryOutput) {
  for (float bad : {kNaN, kInf, -kInf}) {
    Floats x({1, 40}, 1.0f), y({1, 40}), ones({40}, 1.0f), one({1});
    x[17] = bad;
    layernorm_forward(ctx, {.y = y.tensor(),
                            .mean = one.tensor(),
                            .rstd = one.tensor(),
                            .x = x.tensor(),
                            .gain = ones.tensor(),
                            .bias = ones.tensor()});
    EXPECT_FALSE(std::isfinite(y[0]));
    Floats product({1, 1});
    matmul(ctx,
           {.c = product.tensor(), .a = x.tensor(), .b = ones.tensor().view({1, 40}), .transpose_b = true});
    EXPECT_FALSE(std::isfinite(product[0]));
    EXPECT_FALSE(std::isfinite(sum_of_squares(ctx, x.tensor())));
    EXPECT_FALSE(std::isfinite(dot(ctx, x.tensor(), x.tensor())));
    EXPECT_FALSE(std::isfinite(max_abs(ctx, x.tensor())));
    row_norms(ctx, {.norms = one.tensor(), .x = x.tensor()});
    EXPECT_FALSE(std::isfinite(one[0]));
    Floats norms({40});
    col_norms(ctx, {.norms = norms.tensor(), .x = x.tensor()});
    EXPECT_FALSE(std::isfinite(norms[17]));
    bias_backward(ctx, {.dbias = norms.tensor(), .dy = x.tensor()});
    EXPECT_FALSE(std::isfinite(norms[17]));
    EXPECT_EQ(norms[16], 1.0f);
  }
  Floats x({40}, 1.0f), y({40});
  x[17] = kNaN;
  gelu_forward(ctx, {.y = y.tensor(), .x = x.tensor()});
  EXPECT_TRUE(std::isnan(y[17]));
  EXPECT_NEAR(y[16], gelu_of(1), 1e-6);
}

TEST_F(Ops, MatmulIgnoresWhatTheOutputHeldWhenBetaIsZero) {
  Floats a({3, 4}, 1.0f), b({4, 5}, 1.0f), c({3, 5}, kNaN), bias({5}, 2.0f);
  matmul(ctx, {.c = c.tensor(), .a = a.tensor(), .b = b.tensor(), .bias = bias.tensor()});
  for (float value : c.memory) EXPECT_EQ(value, 6.0f);
  c = Floats({3, 5}, kNaN);
  batched_matmul(
      ctx,
      {.c = c.tensor().view({1, 3, 5}), .a = a.tensor().view({1, 3, 4}), .b = b.tensor().view({1, 4, 5})});
  for (float value : c.memory) EXPECT_EQ(value, 4.0f);
}

TEST_F(Ops, SymmetricProductsAreSymmetricToTheBit) {
  for (int64_t M : {5, 130, 400}) {
    Floats a({2, M, 37}), c({2, M, M});
    std::mt19937 random(1);
    for (float& value : a.memory) value = std::normal_distribution<float>()(random);
    batched_matmul(
        ctx, {.c = c.tensor(), .a = a.tensor(), .b = a.tensor(), .transpose_b = true, .symmetric = true});
    for (int64_t i = 0; i < 2; ++i)
      for (int64_t r = 0; r < M; ++r)
        for (int64_t k = 0; k < r; ++k) ASSERT_EQ(c[(i * M + r) * M + k], c[(i * M + k) * M + r]);
  }
}

TEST_F(Ops, NormsNeitherOverflowNorVanish) {
  for (float size : {1e30f, 1e-30f}) {
    Floats x({3, 20}, size), rows({3}), cols({20});
    row_norms(ctx, {.norms = rows.tensor(), .x = x.tensor()});
    col_norms(ctx, {.norms = cols.tensor(), .x = x.tensor()});
    EXPECT_NEAR(rows[0] / size, std::sqrt(20), 1e-5);
    EXPECT_NEAR(cols[0] / size, std::sqrt(3), 1e-5);
    EXPECT_NEAR(sum_of_squares(ctx, x.tensor()) / size / size, 60, 1e-4);
  }
}

// What the headers promise beyond "deterministic": the number of threads does not matter to these.
TEST_F(Ops, SomeResultsDoNotDependOnTheNumberOfThreads) {
  const auto same = [](const OpCase& op_case) {
    const Values before = random_values(op_case);
    EXPECT_EQ(run(op_case, before, 1), run(op_case, before, 7)) << op_case.name;
  };
  same(bias_backward_case(100, 300, true));
  same(embedding_backward_case(3, 40, 200, 13, false, false));
  same(gelu_backward_case(3, 40, 200, false));
  same(cross_entropy_case(20, 1500, 1536, true));
  same(whole_tensor_case("sum_of_squares", 700001));
  same(whole_tensor_case("dot", 700001));
  same(norms_case(true, 100, 500));
  same(norms_case(false, 100, 500));
}

TEST_F(Ops, WrongShapesAreErrors) {
  Floats small({2, 3}), large({2, 4}), three({3}), two({2});
  EXPECT_THROW(gelu_forward(ctx, {.y = small.tensor(), .x = large.tensor()}), ShapeError);
  EXPECT_THROW(matmul(ctx, {.c = small.tensor(), .a = small.tensor(), .b = large.tensor()}), ShapeError);
  EXPECT_THROW(matmul(ctx, {.c = small.tensor(),
                            .a = two.tensor().view({2, 1}),
                            .b = three.tensor().view({1, 3}),
                            .bias = two.tensor()}),
               ShapeError);
  EXPECT_THROW(bias_backward(ctx, {.dbias = two.tensor(), .dy = small.tensor()}), ShapeError);
  EXPECT_THROW(row_norms(ctx, {.norms = three.tensor(), .x = small.tensor()}), ShapeError);
  EXPECT_THROW(layernorm_forward(ctx, {.y = small.tensor(),
                                       .mean = two.tensor(),
                                       .rstd = two.tensor(),
                                       .x = small.tensor(),
                                       .gain = three.tensor(),
                                       .bias = three.tensor(),
                                       .residual = small.tensor()}),
               ShapeError);
  EXPECT_THROW(batched_matmul(ctx, {.c = small.tensor().view({1, 2, 3}),
                                    .a = two.tensor().view({1, 2, 1}),
                                    .b = three.tensor().view({1, 1, 3}),
                                    .symmetric = true}),
               ShapeError);
}

}  // namespace
