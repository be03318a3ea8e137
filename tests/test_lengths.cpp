// Lengths that a step measures together with ||g||_2 (Rule::lengths): directions are those of gradients that
// nobody has measured, the norm is that of all entries, and the gradient is not read a second time for it.
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "tests/optim_fixture.h"

namespace {
constexpr const char* kRules[] = {"steepest:norm=frobenius",
                                  "steepest:norm=l1-rms",
                                  "steepest:norm=rms-linf",
                                  "colnorm:norm=l1-l2",
                                  "rownorm:norm=l2-linf",
                                  "sgd:normalize=1",
                                  "scion:norm=frobenius,radius=3,alpha=1",
                                  "colnorm:momentum=0.9",
                                  "colnorm:norm=l1-l1.5",
                                  "sgd"};

OptimizerOptions of_rule(const std::string& rule) {
  OptimizerOptions options = everywhere(rule, "sgd:normalize=1,norm=rms");
  options.grad_clip = 0.01;  // as good as always
  return options;
}

class LengthsOn : public testing::TestWithParam<Where> {
 protected:
  static void use(Context& ctx) { GetParam() == Where::gpu ? use_gpu(ctx, 0, DType::f32) : use_cpu(ctx, 2); }
};

/// The directions of every parameter that `options` gives to the gradients of one step.
std::map<std::string, std::vector<float>> directions_of(SmallModel& model) {
  model.optimizer.step(0, 20, /*keep_directions=*/true);
  std::map<std::string, std::vector<float>> directions;
  for (const Parameter& p : model.table) directions[p.name] = download(model.ctx, p.grad).data;
  return directions;
}

/// The dual vectors of the gradients, matrix by matrix, by the norms of the rules.
std::map<std::string, std::vector<float>> duals_of(SmallModel& model, double radius) {
  std::map<std::string, std::vector<float>> duals;
  for (const RowStep& row : model.optimizer.last_steps()) {
    const Parameter& p = *row.parameter;
    const int64_t rows = p.shape[0] / p.matrices;
    for (int i = 0; i < p.matrices; ++i) {
      const Tensor g = p.grad.slice(i * rows, rows);
      dualize(model.ctx, {.out = g,
                          .g = g,
                          .norm = row.norm,
                          .radius = p.is_matrix() ? radius : 1,
                          .transposed = p.stored_transposed()});
    }
    duals[p.name] = download(model.ctx, p.grad).data;
  }
  return duals;
}

TEST_P(LengthsOn, DirectionsAreThoseOfGradientsThatNobodyHasMeasured) {
  for (const std::string rule :
       {"steepest:norm=frobenius", "steepest:norm=l1-rms", "steepest:norm=rms-linf", "colnorm:norm=l1-l2",
        "rownorm:norm=l2-linf", "sgd:normalize=1", "scion:norm=frobenius,radius=3,alpha=1"}) {
    SCOPED_TRACE(rule);
    SmallModel model(of_rule(rule), use), expected(of_rule(rule), use);
    for (SmallModel* each : {&model, &expected}) each->set_gradients(3);
    EXPECT_EQ(directions_of(model), duals_of(expected, rule.starts_with("scion") ? 3 : 1));
  }
}

TEST_P(LengthsOn, TheNormIsThatOfAllEntries) {
  for (const std::string rule : kRules) {
    SCOPED_TRACE(rule);
    SmallModel model(of_rule(rule), use);
    model.set_gradients(3);
    double squares = 0;
    for (const Parameter& p : model.table)
      for (const float g : download(model.ctx, p.grad).data) squares += static_cast<double>(g) * g;
    model.optimizer.step(0, 20);
    EXPECT_NEAR(model.optimizer.report().grad_norm / std::sqrt(squares), 1, 1e-6);
  }
}

// What is squared for ||g||_2 are the lengths of the matrices, which are few; all entries where a rule asks
// for none, because it remembers gradients or divides by other lengths.
TEST_P(LengthsOn, TakeTheReadingOfTheNorm) {
  for (const std::string rule : kRules) {
    SCOPED_TRACE(rule);
    SmallModel model(of_rule(rule), use);
    model.step(0);
    Profile profile;
    model.ctx.profile = &profile;
    model.step(1);
    model.ctx.profile = nullptr;
    double squared = 0, hidden = 0;
    for (const Profile::Row& row : profile.rows())
      if (row.op == "sums_of_squares") squared += row.work.bytes;
    for (const Parameter& p : model.table)
      if (p.role == Role::hidden) hidden += static_cast<double>(p.grad.bytes());
    const bool asks = rule != "sgd" && rule != "rownorm:norm=l2-linf" && rule != "steepest:norm=rms-linf" &&
                      rule != "colnorm:momentum=0.9" && rule != "colnorm:norm=l1-l1.5";
    if (asks)
      EXPECT_LT(squared, hidden / 4);
    else
      EXPECT_GE(squared, hidden);
  }
}

TEST_P(LengthsOn, AGradientThatIsNotFiniteIsNamedAndChangesNothing) {
  for (const char* rule : {"steepest:norm=frobenius", "colnorm"}) {
    SmallModel model(of_rule(rule), use);
    model.step(0);
    const std::vector<float> weights = model.weights();
    model.set_gradients(3);
    const Tensor& poisoned = model.table.at("h.1.mlp.c_fc.weight").grad;
    Matrix g = download(model.ctx, poisoned);
    g.data[5] = std::nanf("");
    upload(model.ctx, poisoned, g);
    model.optimizer.step(1, 20);
    try {
      model.optimizer.report();
      ADD_FAILURE() << rule << ": no error";
    } catch (const RunError& error) {
      EXPECT_NE(std::string(error.what()).find("h.1.mlp.c_fc.weight"), std::string::npos) << error.what();
    }
    EXPECT_EQ(model.weights(), weights);
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, LengthsOn,
                         kHaveGpu ? testing::Values(Where::cpu, Where::gpu)
                                  : testing::Values(Where::cpu, Where::cpu),
                         [](const auto& info) { return std::string(info.index == 0 ? "cpu" : "gpu"); });
}  // namespace
