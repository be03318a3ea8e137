// The optimizer on a GPU, or in the executor: the checks that the CPU passes too, agreement with the CPU, and
// what is different there: bf16, many tensors in one launch, numbers that come late.
#include "model/kernels/readback.h"
#include "model/kernels/reduce.h"
#include "model/kernels/stream.h"
#include "optim/norm.h"
#include "optim/svd.h"
#include "tests/norm_fixture.h"
#include "tests/optim_checks.h"
#include "tests/polar_fixture.h"
#include "tests/thread_orders.h"

namespace {
void on_gpu(Context& ctx) {
  use_gpu(ctx, 0, DType::f32);
}
void on_gpu_in_bf16(Context& ctx) {
  use_gpu(ctx, 0, DType::bf16);
}

struct GpuContext : Context {
  explicit GpuContext(UseDevice use = on_gpu) {
    use(*this);
    scratch.reserve(int64_t{8} << 20);
  }
};

/// The largest |a - b| over the largest |b|.
double deviation_of(const std::vector<float>& a, const std::vector<float>& b) {
  Matrix left(1, static_cast<int64_t>(a.size())), right = left;
  left.data = a;
  right.data = b;
  return deviation(left, right);
}
}  // namespace

TEST(GpuRules, ExpectedTrajectories) {
  check_trajectories(on_gpu);
}

TEST(GpuRules, Equalities) {
  check_equalities(on_gpu);
}

TEST(GpuRules, ZeroGradients) {
  check_zero_gradients(on_gpu);
}

TEST(GpuRules, ExtremeGradients) {
  check_extreme_gradients(on_gpu);
}

TEST(GpuRules, NorMuonEvensLines) {
  check_normuon_evens_lines(on_gpu);
  check_normuon_evens_lines(on_gpu_in_bf16);
}

TEST(GpuOptimizer, ClippingScalesGradients) {
  check_clipping(on_gpu);
}

TEST(GpuOptimizer, NonFiniteGradientChangesNothing) {
  check_non_finite(on_gpu);
  check_non_finite(on_gpu_in_bf16);
}

TEST(GpuOptimizer, ReportsMayComeLate) {
  check_late_reports(on_gpu);
}

/// All of them. Of directions that no gradient has had shampoo takes the root of rounding, and soap any
/// basis: with an eps above that, and of the smaller side alone, they do what is asked of both devices.
std::vector<OptimizerOptions> all_that_gradients_decide() {
  std::vector<OptimizerOptions> list = all_options();
  for (OptimizerOptions& options : list)
    for (auto& [role, rule] : options.rules) {
      if (rule == "shampoo") rule = "shampoo:eps=1e-4";
      if (rule == "soap") rule = "soap:sides=one,eps=1e-3";
    }
  return list;
}

// All recipes, exact rules, a sharpness and clipping; with q, k and v of odd sizes.
TEST(GpuOptimizer, SameAsOnTheCpu) {
  for (const OptimizerOptions& options : all_that_gradients_decide()) {
    SCOPED_TRACE(options.rules.at(Role::hidden) + " " + options.rules.at(Role::embedding));
    SmallModel there(options, on_gpu, 15), here(options, on_cpu, 15);
    EXPECT_EQ(there.weights(), here.weights());
    for (int64_t t = 0; t < 3; ++t) {
      const StepReport got = there.step(t), want = here.step(t);
      EXPECT_NEAR(got.grad_norm / want.grad_norm, 1, 1e-12);
      EXPECT_NEAR(got.clip_scale / want.clip_scale, 1, 1e-12);
      EXPECT_NEAR(got.lr / want.lr, 1, 1e-5);
    }
    EXPECT_LT(deviation_of(there.weights(), here.weights()), 1e-4);
    EXPECT_LT(deviation_of(there.state(), here.state()), 1e-5);
  }
}

TEST(GpuOptimizer, Capturable) {
  OptimizerOptions options = recipe_options("muon");
  SmallModel plain(options, on_gpu);
  EXPECT_TRUE(plain.optimizer.capturable());
  options.sharpness = 10;
  EXPECT_FALSE(SmallModel(options, on_gpu).optimizer.capturable());
  options.sharpness = 0;
  options.rules[Role::hidden] = "muon:ns=svd";
  EXPECT_FALSE(SmallModel(options, on_gpu).optimizer.capturable());
  Profile profile;
  plain.ctx.profile = &profile;
  EXPECT_FALSE(plain.optimizer.capturable());
}

// A step that is captured into a graph and replayed with new step sizes does what the direct one does.
TEST(GpuOptimizer, SameBitsAsAGraph) {
  for (const Recipe& recipe : recipe_table()) {
    SmallModel direct(recipe_options(recipe.name), on_gpu_in_bf16),
        captured(recipe_options(recipe.name), on_gpu_in_bf16);
    StepGraph graph(captured.ctx, captured.optimizer.capturable());
    for (int64_t t = 0; t < 4; ++t) {
      captured.set_gradients(t);
      graph.run([&] { captured.optimizer.step(t, 20); });
      const StepReport got = captured.optimizer.report(captured.optimizer.mark()), want = direct.step(t);
      EXPECT_EQ(got.grad_norm, want.grad_norm);
      EXPECT_EQ(got.lr, want.lr);
    }
    EXPECT_EQ(captured.weights(), direct.weights()) << recipe.name;
    EXPECT_EQ(captured.state(), direct.state()) << recipe.name;
  }
}

TEST(GpuOptimizer, SameBitsInAnyOrderOfThreads) {
  for (const UseDevice use : {on_gpu, on_gpu_in_bf16})
    for (const Recipe& recipe : recipe_table()) {
      std::vector<float> weights, state;
      for_each_thread_order([&](const std::string& order) {
        SmallModel model(recipe_options(recipe.name), use, 15);
        for (int64_t t = 0; t < 2; ++t) model.step(t);
        if (weights.empty()) weights = model.weights(), state = model.state();
        EXPECT_EQ(model.weights(), weights) << recipe.name << ", " << order;
        EXPECT_EQ(model.state(), state) << recipe.name << ", " << order;
      });
    }
}

// Masters and state stay f32; what products read is their rounding, after every step.
TEST(GpuOptimizer, CopiesAreTheRoundedWeights) {
  for (const Recipe& recipe : recipe_table()) {
    SmallModel model(recipe_options(recipe.name), on_gpu_in_bf16, 15);
    for (int64_t t = 0; t < 2; ++t) {
      model.step(t);
      for (const Parameter& p : model.table) {
        ASSERT_EQ(p.compute.dtype, DType::bf16);
        Matrix want = download(model.ctx, p.value);
        for (float& w : want.data) w = to_float(to_bf16(w));
        EXPECT_EQ(download(model.ctx, p.compute).data, want.data) << recipe.name << " " << p.name;
      }
    }
  }
}

// Newton-Schulz in bf16 turns the hidden matrices by a little less exact angles; all else is the same in f32.
TEST(GpuOptimizer, Bf16IsCloseToF32) {
  SmallModel half(recipe_options("muon"), on_gpu_in_bf16), full(recipe_options("muon"), on_gpu);
  const auto start = full.weights();
  half.step(0);
  full.step(0);
  for (size_t i = 0; i < half.table.rows().size(); ++i) {
    const Parameter &p = half.table.rows()[i], &q = full.table.rows()[i];
    const Matrix got = download(half.ctx, p.value), want = download(full.ctx, q.value);
    if (p.role != Role::hidden) {
      EXPECT_EQ(got.data, want.data) << p.name;
      continue;
    }
    const Matrix u = download(half.ctx, p.grad), v = download(full.ctx, q.grad);
    EXPECT_GT(inner(u, v) / std::sqrt(inner(u, u) * inner(v, v)), 0.995) << p.name;
    EXPECT_NEAR(std::sqrt(inner(u, u) / inner(v, v)), 1, 0.03) << p.name;
  }
}

// More than the arguments of one launch can name; 5 x 3 floats begin anywhere.
TEST(GpuRules, MoreMatricesThanFitOneLaunch) {
  constexpr uint32_t kMany = 200;
  std::vector<Matrix> weights, gradients;
  for (uint32_t i = 0; i < kMany; ++i) {
    weights.push_back(random_matrix(5, 3, i));
    gradients.push_back(random_matrix(5, 3, 1000 + i));
  }
  for (const char* rule : {"muon:steps=2", "adam", "signum", "sgd:momentum=0.9,nesterov=1"}) {
    RuleDriver there(rule, weights, /*transposed=*/false, on_gpu), here(rule, weights);
    for (int t = 0; t < 2; ++t) {
      there.step(gradients);
      here.step(gradients);
    }
    for (int64_t i = 0; i < kMany; ++i)
      ASSERT_LT(deviation(there.weight(i), here.weight(i)), 1e-5) << rule << " " << i;
  }
}

TEST(GpuPolar, ExpectedMatrices) {
  check_expected_polars<float>(on_gpu);
  check_expected_polars<double>(on_gpu);
}

TEST(GpuPolar, SameAsFloat64) {
  check_polars_in_float64<float>(on_gpu);
  check_polars_in_float64<double>(on_gpu);
}

TEST(GpuPolar, ExactMethods) {
  check_exact_methods<float>(on_gpu);
  check_exact_methods<double>(on_gpu);
}

TEST(GpuPolar, ZeroAndNaN) {
  check_polars_of_zero_and_nan(on_gpu);
  check_polars_of_zero_and_nan(on_gpu_in_bf16);
}

// Keller's steps take singular values from 0.05 on into a band around 1; rounding widens it. A product that
// is rounded to 8 bits is off by up to 2^-9 of its elements, in the spectral norm by about as much for
// elements of either sign; three products a step, and the polynomial's slope in the band, below 1.8, carries
// the error of one step into the next: 2^-9 * 3 * (1.8^5 - 1) / 0.8 = 0.13 at worst, when all errors agree.
// They don't: half of it.
TEST(GpuPolar, Bf16StaysInTheBand) {
  constexpr double kRounding = 0.065;
  GpuContext ctx(on_gpu_in_bf16);
  CpuContext cpu;
  std::vector<double> values;
  for (int i = 0; i < 32; ++i) values.push_back(std::pow(10.0, -1.0 * i / 31));
  double norm = 0;
  for (double value : values) norm += value * value;
  const double least =
      0.1 / std::sqrt(norm);  // of the normalised matrix: on the steep part of the polynomial
  double low = 10, high = 0;
  for (int i = 0; i <= 10000; ++i) {
    double x = least * std::pow(1 / least, i / 10000.0);
    x = polar_method("keller5").apply(x);
    low = std::min(low, x);
    high = std::max(high, x);
  }
  uint32_t seed = 1;
  for (const auto& [rows, cols] : {std::pair{32, 32}, {32, 128}, {128, 32}, {33, 47}}) {
    const Matrix g = with_singular_values(cpu, rows, cols, values, seed += 2);
    Matrix p = polar_of(ctx, g, polar_method("keller5"), DType::bf16);
    std::vector<double> got(static_cast<size_t>(std::min(rows, cols)));
    singular_values(cpu, p.tensor(), got);
    EXPECT_LT(got[0], high + kRounding) << rows << " x " << cols;
    EXPECT_GT(got[31], low - kRounding) << rows << " x " << cols;
    EXPECT_GT(inner(exact_polar(cpu, g), p) / 32, low) << rows << " x " << cols;  // in the right directions
  }
}

TEST(GpuNorm, ExpectedNumbers) {
  check_expected_norms<float>(on_gpu);
  check_expected_norms<double>(on_gpu);
}

namespace {
template <typename T>
void check_norms_as_on_the_cpu(double tolerance) {
  GpuContext ctx;
  CpuContext cpu;
  const auto g = as<T>(random_matrix(2 * 21, 33, 3));
  const ThereOf<T> there(ctx, g), here(cpu, g);
  for (const Norm& kind : matrix_norms())
    for (const bool transposed : {false, true}) {
      SCOPED_TRACE(norm_name(kind));
      std::vector<double> got(2), want(2);
      norms(ctx, kind, there.batch(2), transposed, got);
      norms(cpu, kind, here.batch(2), transposed, want);
      for (const size_t i : {0, 1}) EXPECT_NEAR(got[i] / want[i], 1, tolerance);
      dual_norms(ctx, kind, there.batch(2), transposed, got);
      dual_norms(cpu, kind, here.batch(2), transposed, want);
      for (const size_t i : {0, 1}) EXPECT_NEAR(got[i] / want[i], 1, tolerance);
      const ThereOf<T> out(ctx, g), expected(cpu, g), in_place(ctx, g);
      dualize(ctx, {.out = out.batch(2), .g = there.batch(2), .norm = kind, .transposed = transposed});
      dualize(cpu, {.out = expected.batch(2), .g = here.batch(2), .norm = kind, .transposed = transposed});
      EXPECT_LT(deviation(out.here(), expected.here()), 2 * tolerance);
      dualize(ctx,
              {.out = in_place.batch(2), .g = in_place.batch(2), .norm = kind, .transposed = transposed});
      EXPECT_EQ(in_place.here().data, out.here().data) << "in place";
    }
}
}  // namespace

TEST(GpuNorm, SameAsOnTheCpu) {
  check_norms_as_on_the_cpu<float>(1e-6);
  check_norms_as_on_the_cpu<double>(1e-12);
}

TEST(GpuNorm, ModularNumbers) {
  check_modular_numbers<float>(on_gpu, 2e-6);
  check_modular_numbers<double>(on_gpu, 1e-9);
}

TEST(GpuReduce, NormsNeitherOverflowNorVanish) {
  GpuContext ctx;
  for (const auto& [rows, cols] : {std::pair{3, 20}, {2, 10000}, {600, 4}})
    for (const double size : {1e30, 1e-30}) {
      Matrix ones(rows, cols);
      for (float& x : ones.data) x = static_cast<float>(size);
      const There x(ctx, ones), by_rows(ctx, Matrix(1, rows)), by_cols(ctx, Matrix(1, cols));
      row_norms(ctx, {.norms = by_rows.tensor()[0], .x = x.tensor()});
      col_norms(ctx, {.norms = by_cols.tensor()[0], .x = x.tensor()});
      EXPECT_NEAR(by_rows.here().data.back() / size / std::sqrt(cols), 1, 1e-6);
      EXPECT_NEAR(by_cols.here().data.back() / size / std::sqrt(rows), 1, 1e-6);
      EXPECT_NEAR(sum_of_squares(ctx, x.tensor()) / size / size / (rows * cols), 1, 1e-6);
    }
}

TEST(GpuReduce, NonFiniteInputsReachEveryResult) {
  GpuContext ctx;
  for (const float bad : {std::nanf(""), INFINITY, -INFINITY}) {
    Matrix m(3, 3000);
    m(1, 2999) = bad;
    const There x(ctx, m), by_rows(ctx, Matrix(1, 3)), by_cols(ctx, Matrix(1, 3000));
    EXPECT_FALSE(std::isfinite(sum_of_squares(ctx, x.tensor())));
    EXPECT_FALSE(std::isfinite(dot(ctx, x.tensor(), x.tensor())));
    EXPECT_FALSE(std::isfinite(sum_abs(ctx, x.tensor())));
    EXPECT_EQ(std::isnan(max_abs(ctx, x.tensor())), std::isnan(bad));
    EXPECT_FALSE(std::isfinite(max_abs(ctx, x.tensor())));
    row_norms(ctx, {.norms = by_rows.tensor()[0], .x = x.tensor()});
    col_norms(ctx, {.norms = by_cols.tensor()[0], .x = x.tensor()});
    EXPECT_FALSE(std::isfinite(by_rows.here()(0, 1)));
    EXPECT_EQ(by_rows.here()(0, 2), 0);
    EXPECT_FALSE(std::isfinite(by_cols.here()(0, 2999)));
    EXPECT_EQ(by_cols.here()(0, 0), 0);
  }
}

// A direction in bf16 against a gradient in f32: the dual norm of a step by sharpness.
TEST(GpuReduce, DotOfTwoDtypes) {
  GpuContext ctx(on_gpu_in_bf16);
  const Matrix a = random_matrix(7, 301, 1);
  Matrix b = random_matrix(7, 301, 2);
  for (float& x : b.data) x = to_float(to_bf16(x));
  const There left(ctx, a), right(ctx, b, DType::bf16);
  EXPECT_NEAR(dot(ctx, left.tensor(), right.tensor()), inner(a, b), 1e-9);
  EXPECT_NEAR(dot(ctx, right.tensor(), left.tensor()), inner(a, b), 1e-9);
}

TEST(GpuReadback, TicketsAndTheRing) {
  for (const UseDevice use : {on_cpu, on_gpu}) {
    Context ctx;
    use(ctx);
    Arena arena("values");
    Tensor values;
    arena.add(&values, DType::f64, {2});
    arena.allocate(ctx);
    Readback readback(ctx, 2);
    const auto fetch = [&](double value) {
      OnHost host(ctx, values, /*load=*/false);
      host->f64()[0] = value;
      host->f64()[1] = -value;
      host.store();
      readback.fetch(values);
    };
    EXPECT_THROW(readback.wait(0), std::logic_error);
    fetch(1);
    EXPECT_EQ(readback.mark(), 0);
    EXPECT_EQ(readback.mark(), 0);
    fetch(2);
    EXPECT_THROW(readback.wait(1), std::logic_error);  // not marked
    EXPECT_EQ(readback.mark(), 1);
    EXPECT_EQ(readback.wait(0)[0], 1);
    EXPECT_EQ(readback.wait(1)[1], -2);
    fetch(3);
    fetch(4);                                          // in its place
    EXPECT_THROW(readback.wait(0), std::logic_error);  // overwritten
    EXPECT_EQ(readback.wait(1)[0], 2);
    EXPECT_EQ(readback.mark(), 2);
    EXPECT_EQ(readback.wait(2)[0], 4);
    Readback longer(ctx, 2, 4);
    for (int i = 0; i < 6; ++i) {
      longer.fetch(values);
      longer.mark();
    }
    EXPECT_NO_THROW(longer.wait(2));
    EXPECT_THROW(longer.wait(1), std::logic_error);
  }
}

// The same arithmetic as the CPU's, down to NaN, zero and what underflows.
TEST(GpuUpdate, SpecialValues) {
  GpuContext ctx;
  Matrix x(1, 8);
  x.data = {0, -0.0f, std::nanf(""), INFINITY, -INFINITY, 1e-45f, -1e-45f, 1e-25f};
  const There g(ctx, x), u(ctx, x), nothing(ctx, Matrix(1, 1));
  sign(ctx, {.u = u.tensor(), .x = g.tensor()});
  const Matrix signs = u.here();
  EXPECT_EQ(signs(0, 0), 0);
  EXPECT_EQ(signs(0, 1), 0);
  EXPECT_TRUE(std::isnan(signs(0, 2)));
  for (int i : {3, 5, 7}) EXPECT_EQ(signs(0, i), 1);
  for (int i : {4, 6}) EXPECT_EQ(signs(0, i), -1);
  adam_direction(ctx, {.u = u.tensor(), .g = g.tensor(), .beta1 = 0, .beta2 = 0, .eps = 0});
  const Matrix adam = u.here();
  EXPECT_EQ(adam(0, 0), 0);
  EXPECT_TRUE(std::isnan(adam(0, 2)));
  for (int i : {5, 7}) EXPECT_EQ(adam(0, i), 1);
  EXPECT_EQ(adam(0, 6), -1);
}
