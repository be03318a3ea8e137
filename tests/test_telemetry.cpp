// Telemetry against the definitions in float64 and against what is known of a quadratic, on every device of
// this binary.
#include "optim/telemetry.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "model/gpt.h"
#include "optim/svd.h"
#include "tests/optim_fixture.h"

namespace {
void on_gpu(Context& ctx) {
  use_gpu(ctx, 0, DType::f32);
}
UseDevice use_of(Where where) {
  return where == Where::cpu ? on_cpu : on_gpu;
}

class TelemetryOn : public testing::TestWithParam<Where> {
 protected:
  UseDevice use() const { return use_of(GetParam()); }
};
INSTANTIATE_TEST_SUITE_P(On, TelemetryOn,
                         testing::ValuesIn(kHaveGpu ? std::vector{Where::cpu, Where::gpu}
                                                    : std::vector{Where::cpu}),
                         [](const auto& info) { return info.param == Where::cpu ? "Cpu" : "Gpu"; });

/// SmallModel's optimizer under telemetry. The gradients of a step do not depend on the weights.
StepNorms measure_step(SmallModel& model, Telemetry& telemetry, int64_t t) {
  return telemetry.measure({.t = t,
                            .gradients =
                                [&] {
                                  model.set_gradients(t);
                                  return 1.0;
                                },
                            .update = [&] { model.optimizer.step(t, 20, /*keep_directions=*/true); }});
}

/// All tensors at one moment.
using Values = std::map<std::string, Matrix64>;
enum class What : uint8_t { values, gradients };
Values values_of(Context& ctx, const ParameterTable& table, What what) {
  Values all;
  for (const Parameter& p : table) {
    const OnHost host(ctx, what == What::values ? p.value : p.grad);
    Matrix64 m(p.is_matrix() ? p.shape[0] : 1, p.is_matrix() ? p.shape[1] : p.shape[0]);
    std::ranges::copy(host->floats(), m.data.begin());
    all[p.name] = m;
  }
  return all;
}

/// norm.h's definitions, once more: max and sum over the entries, the singular values, or the lines of the
/// storage.
struct Measure {
  double norm, dual;
  double least;  // the smallest of them, as the norm is the largest
};
Measure measure_block(Matrix64 m, const Norm& kind, bool transposed) {
  const int64_t out = transposed ? m.cols : m.rows, in = transposed ? m.rows : m.cols;
  double largest = 0, sum = 0, least = INFINITY;
  const auto take = [&](double x) { largest = std::max(largest, x), least = std::min(least, x), sum += x; };
  if (is_spectral(kind)) {
    Context host;
    use_cpu(host, 1);
    host.scratch.reserve(svd_scratch_bytes(host, m.rows, m.cols));
    std::vector<double> values(static_cast<size_t>(std::min(m.rows, m.cols)));
    singular_values(host, m.tensor(), values);
    for (const double x : values) take(x);
  } else if (kind.kind == NormKind::l1_linf) {
    for (const double x : m.data) take(std::fabs(x));
  } else {  // l1-rms of embeddings: the paper's columns are the rows here
    EXPECT_TRUE(transposed && kind.kind == NormKind::l1_rms);
    for (int64_t i = 0; i < m.rows; ++i) {
      double squares = 0;
      for (int64_t j = 0; j < m.cols; ++j) squares += m(i, j) * m(i, j);
      take(std::sqrt(squares));
    }
  }
  const double c = norm_scale(kind, out, in);
  return {largest / c, sum * c, least / c};
}
Measure measure_all(const Parameter& p, const Matrix64& m, const Norm& kind) {
  if (p.matrices == 1) return measure_block(m, kind, p.stored_transposed());
  Measure whole{0, 0, INFINITY};
  const int64_t rows = m.rows / p.matrices;
  for (int64_t i = 0; i < p.matrices; ++i) {
    Matrix64 block(rows, m.cols);
    std::copy_n(m.data.begin() + i * block.rows * m.cols, block.data.size(), block.data.begin());
    const Measure one = measure_block(block, kind, false);
    whole = {std::max(whole.norm, one.norm), whole.dual + one.dual, std::min(whole.least, one.least)};
  }
  return whole;
}
Matrix64 difference(const Matrix64& a, const Matrix64& b) {
  Matrix64 d = a;
  for (size_t i = 0; i < d.data.size(); ++i) d.data[i] -= b.data[i];
  return d;
}

/// A GPT on a fixed batch: its gradients know the weights.
struct SmallGpt {
  Context ctx;
  Gpt model;
  Optimizer optimizer;
  Telemetry telemetry;
  std::vector<int32_t> tokens, targets;

  SmallGpt(const OptimizerOptions& options, UseDevice use, int64_t C)
      : model((use(ctx), ctx), {.name = "small", .L = 1, .NH = 2, .C = C, .positions = 12, .V = 37}, 24,
              /*training=*/true),
        optimizer(ctx, model.parameters(), options),
        telemetry(ctx, model.parameters(), optimizer, 1) {
    model.allocate();
    optimizer.allocate();
    telemetry.allocate();
    model.parameters().initialize(11);
    for (int32_t i = 0; i < 24; ++i) tokens.push_back(i * i % 37), targets.push_back((i + 1) * (i + 1) % 37);
  }
  double gradients() {
    return model.forward_backward(Tensor(tokens.data(), {2, 12}), Tensor(targets.data(), {2, 12}), 1, false);
  }
  Values values(What what) { return values_of(ctx, model.parameters(), what); }
};

OptimizerOptions mixed() {  // decay, momentum, sensitivities and three kinds of norms
  OptimizerOptions options = everywhere("muon:lr=0.02,wd=0.5,s=2", "adam:lr=0.003,wd=0.2,cautious=1");
  options.rules[Role::embedding] = "colnorm:lr=0.01,wd=0.1";
  options.rules[Role::position] = "sign:lr=0.002";
  options.sensitivities = {"h.0.mlp.c_fc=3"};
  return options;
}

/// Two steps of a GPT, the second measured and compared with the definitions.
void check_definitions(UseDevice use, int64_t C, double tolerance) {
  SmallGpt gpt(mixed(), use, C);
  gpt.gradients();
  gpt.optimizer.step(0, 20);
  const Values w = gpt.values(What::values);
  Values g, u, moved, after;
  double loss = 0;
  const StepNorms found = gpt.telemetry.measure({.t = 1,
                                                 .gradients =
                                                     [&] {
                                                       const double value = gpt.gradients();
                                                       (g.empty() ? g : after) = gpt.values(What::gradients);
                                                       if (after.empty()) loss = value;
                                                       return value;
                                                     },
                                                 .update =
                                                     [&] {
                                                       gpt.optimizer.step(1, 20, true);
                                                       u = gpt.values(What::gradients);
                                                       moved = gpt.values(What::values);
                                                     }});
  EXPECT_EQ(found.step, 1);
  EXPECT_EQ(found.loss, loss);
  EXPECT_NEAR(found.loss_after, gpt.gradients(), 1e-12);
  double predicted = 0, curvature = 0, length = 0;
  const std::vector<RowStep> rows = gpt.optimizer.last_steps();
  ASSERT_EQ(found.tensors.size(), rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    const Parameter& p = *rows[i].parameter;
    const TensorNorms& t = found.tensors[i];
    SCOPED_TRACE(p.name);
    EXPECT_EQ(t.name, p.name);
    EXPECT_EQ(t.norm, rows[i].norm);
    const Matrix64 change = difference(moved[p.name], w.at(p.name));
    const Measure weight = measure_all(p, w.at(p.name), t.norm),
                  direction = measure_all(p, u[p.name], t.norm), gradient = measure_all(p, g[p.name], t.norm),
                  step = measure_all(p, change, t.norm);
    const double bent = inner(difference(after[p.name], g[p.name]), change);
    EXPECT_NEAR(t.weight, weight.norm, tolerance * weight.norm);
    EXPECT_NEAR(t.gradient_dual / gradient.dual, 1, tolerance);
    EXPECT_NEAR(t.update / direction.norm, 1, tolerance);
    EXPECT_NEAR(t.alignment, inner(g[p.name], u[p.name]) / (gradient.dual * direction.norm), tolerance);
    EXPECT_NEAR(t.step / (rows[i].step * direction.norm), 1, tolerance);
    EXPECT_NEAR(t.s_step / (rows[i].step * rows[i].sensitivity * direction.norm), 1, tolerance);
    EXPECT_NEAR(t.sharpness, bent / (step.norm * step.norm),
                2 * tolerance * std::fabs(t.sharpness) + 1e-4 * gradient.dual / step.norm);
    EXPECT_EQ(t.band.has_value(), p.is_matrix() && !p.stored_transposed());
    if (t.band) {
      EXPECT_NEAR(t.band->high / direction.norm, 1, tolerance);
      EXPECT_GE(t.band->low, direction.least - tolerance);
      if (C <= Telemetry::kExactSide) {  // beyond, Lanczos comes to the smallest from above
        EXPECT_NEAR(t.band->low, direction.least, tolerance);
      }
    }
    predicted += inner(g[p.name], change);
    curvature += bent;
    length = std::max(length, rows[i].sensitivity * step.norm);
  }
  EXPECT_NEAR(found.predicted / predicted, 1, 1e-4);
  EXPECT_NEAR(found.length / length, 1, tolerance);
  EXPECT_NEAR(found.sharpness * length * length / curvature, 1, 2 * tolerance + 1e-3);
  EXPECT_NEAR(found.bound, loss + predicted + curvature / 2, 1e-5);
  EXPECT_NEAR(found.loss_after, found.bound, 0.05 * std::fabs(predicted));  // a small step: nearly quadratic
}
}  // namespace

TEST_P(TelemetryOn, ValuesAreTheDefinitions) {
  check_definitions(use(), 32, 2e-5);
}

// Beyond kExactSide: Lanczos, and nuclear norms by Newton-Schulz.
TEST_P(TelemetryOn, ValuesOfLargerMatricesAreClose) {
  check_definitions(use(), 136, 2e-3);
}

TEST_P(TelemetryOn, NuclearNorms) {
  Context ctx, host;
  use()(ctx);
  on_cpu(host);
  for (const double power : {0.0, -0.5, -1.0}) {  // singular values that fall slowly or fast
    Matrix m = random_matrix(150, 260, 9);
    for (int64_t i = 0; i < m.rows; ++i)
      for (int64_t j = 0; j < m.cols; ++j)
        m(i, j) *= static_cast<float>(std::pow(static_cast<double>(i + 1), power));
    host.scratch.reserve(svd_scratch_bytes(host, m.rows, m.cols));
    ctx.scratch.reserve(nuclear_norm_scratch_bytes(ctx, m.rows, m.cols));
    std::vector<double> values(150);
    singular_values(host, m.tensor(), values);
    double want = 0;
    for (const double x : values) want += x;
    Tensor g;
    Arena arena("test");
    arena.add(&g, m.tensor().shape);
    arena.allocate(ctx);
    upload(ctx, g, m);
    EXPECT_NEAR(nuclear_norm(ctx, g) / want, 1, 1e-3) << power;
  }
}

// loss = sum_l h_l / 2 ||W_l||^2: a tensor's gradient does not feel the others, and along any step its
// curvature is h_l in the Frobenius norm. That of a fused q, k, v is the widest of three: the curvature of
// their sum counts against the largest.
TEST_P(TelemetryOn, SharpnessOfAQuadraticIsItsCurvature) {
  SmallModel model(everywhere("sgd:lr=0.1,wd=0.3", "sgd:lr=0.1"), use());
  Telemetry telemetry(model.ctx, model.table, model.optimizer, 1);
  telemetry.allocate();
  for (Parameter& p : model.table) upload(model.ctx, p.value, random_matrix(1, p.size(), 5));
  const auto curvature = [](const Parameter& p) { return static_cast<float>(1 + p.name.size() % 5); };
  const auto gradients = [&] {
    double loss = 0;
    for (const Parameter& p : model.table) {
      const Matrix w = download(model.ctx, p.value);
      upload(model.ctx, p.grad, scaled(w, curvature(p)));
      loss += curvature(p) / 2 * inner(w, w);
    }
    return loss;
  };
  const StepNorms found = telemetry.measure(
      {.t = 0, .gradients = gradients, .update = [&] { model.optimizer.step(0, 20, true); }});
  for (const TensorNorms& t : found.tensors) {
    const Parameter& p = model.table.at(t.name);
    double squares = 0, most = 0;  // a step is along W, but for the decay of all of it
    const Matrix w = random_matrix(1, p.size(), 5);
    const auto size = static_cast<std::ptrdiff_t>(p.size() / p.matrices);
    for (int i = 0; i < p.matrices; ++i) {
      const auto begin = w.data.begin() + i * size;
      const double square = std::inner_product(begin, begin + size, begin, 0.0);
      squares += square;
      most = std::max(most, square);
    }
    EXPECT_NEAR(t.sharpness / (curvature(p) * squares / most), 1, 1e-4) << t.name;
  }
  EXPECT_LT(found.loss_after, 0.9 * found.loss);
  EXPECT_NEAR(found.bound / found.loss_after, 1, 1e-5);
}

TEST_P(TelemetryOn, ExactDualRulesAreAligned) {
  for (const char* rule : {"sign", "colnorm", "rownorm", "spectral:ns=svd", "sgd:normalize=1"}) {
    const bool any = rule[0] == 's' && std::string(rule) != "spectral:ns=svd";
    SmallModel model(everywhere(rule, any ? rule : "sign"), use());
    Telemetry telemetry(model.ctx, model.table, model.optimizer, 1);
    telemetry.allocate();
    for (const TensorNorms& t : measure_step(model, telemetry, 0).tensors) {
      EXPECT_NEAR(t.alignment, 1, 1e-5) << rule << " " << t.name;
      EXPECT_NEAR(t.update, 1, 1e-5) << rule << " " << t.name;
      if (t.band && is_spectral(t.norm)) {
        EXPECT_NEAR(t.band->low, 1, 1e-5) << t.name;
      }
    }
  }
  SmallModel model(everywhere("muon", "adam"), use());  // momentum and second moments bend the step
  Telemetry telemetry(model.ctx, model.table, model.optimizer, 1);
  telemetry.allocate();
  for (int64_t t = 0; t < 3; ++t) model.step(t);
  for (const TensorNorms& t : measure_step(model, telemetry, 3).tensors)
    EXPECT_LT(t.alignment, 0.95) << t.name;
}

TEST_P(TelemetryOn, EqualStepsUnderProposition7) {
  OptimizerOptions options = everywhere("spectral:ns=svd", "sign");
  options.rules[Role::embedding] = "colnorm:s=0.5";
  options.sharpness = 10;
  options.sensitivities = {"h.1.*=4"};
  SmallModel model(options, use());
  Telemetry telemetry(model.ctx, model.table, model.optimizer, 1);
  telemetry.allocate();
  const StepNorms found = measure_step(model, telemetry, 0);
  const double eta = model.optimizer.report().lr;
  for (const TensorNorms& t : found.tensors) EXPECT_NEAR(t.s_step / eta, 1, 1e-5) << t.name;
  EXPECT_NEAR(found.length / eta, 1, 1e-4);
  double dual = 0;
  for (size_t i = 0; i < found.tensors.size(); ++i)
    dual += found.tensors[i].gradient_dual / model.optimizer.last_steps()[i].sensitivity;
  EXPECT_NEAR(eta, dual / 10, 1e-5 * eta);
  EXPECT_NEAR(found.predicted / (-eta * dual), 1, 1e-4);  // Hoelder with equality
}

TEST_P(TelemetryOn, MeasuredStepsHaveTheSameBits) {
  std::vector<OptimizerOptions> list = all_options();
  for (size_t i = 0; i < list.size(); i += 2) list[i].grad_clip = 0.1;
  for (const OptimizerOptions& options : list) {
    SCOPED_TRACE(options.rules.at(Role::hidden));
    SmallModel plain(options, use()), watched(options, use());
    Telemetry telemetry(watched.ctx, watched.table, watched.optimizer, 2);
    telemetry.allocate();
    for (int64_t t = 0; t < 3; ++t) {
      plain.step(t);
      if (telemetry.due(t))
        measure_step(watched, telemetry, t);
      else
        watched.step(t);
      ASSERT_EQ(plain.weights(), watched.weights()) << t;
      ASSERT_EQ(plain.state(), watched.state()) << t;
    }
  }
}

TEST_P(TelemetryOn, ZeroAndNonFiniteGradients) {
  SmallModel model(mixed(), use());
  Telemetry telemetry(model.ctx, model.table, model.optimizer, 1);
  telemetry.allocate();
  const auto before = model.weights();
  for (const float value : {0.0f, std::numeric_limits<float>::quiet_NaN()}) {
    const auto gradients = [&] {
      for (const Parameter& p : model.table) {
        Matrix g(1, p.size());
        std::ranges::fill(g.data, value);
        upload(model.ctx, p.grad, g);
      }
      return 1.0;
    };
    // A schedule that has ended: without a step there is no curvature.
    const StepNorms found = telemetry.measure(
        {.t = 20, .gradients = gradients, .update = [&] { model.optimizer.step(20, 20, true); }});
    for (const TensorNorms& t : found.tensors) {
      EXPECT_TRUE(std::isnan(t.alignment)) << t.name;
      EXPECT_TRUE(value == 0 ? t.gradient_dual == 0 : std::isnan(t.gradient_dual)) << t.name;
      EXPECT_TRUE(std::isfinite(t.weight)) << t.name;
    }
  }
  EXPECT_THROW(model.optimizer.report(), RunError);
}

TEST_P(TelemetryOn, NoIntervalTakesNoMemory) {
  SmallModel model(recipe_options("muon"), use());
  const Telemetry none(model.ctx, model.table, model.optimizer, 0);
  EXPECT_EQ(none.bytes(), 0);
  EXPECT_EQ(none.scratch_bytes(), 0);
  EXPECT_FALSE(none.due(0));
  const Telemetry some(model.ctx, model.table, model.optimizer, 3);
  EXPECT_GE(some.bytes(), 8 * model.table.size());
  EXPECT_TRUE(some.due(0) && !some.due(2) && some.due(3));
}
