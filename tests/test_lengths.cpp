// Lengths that a step measures together with ||g||_2 (Rule::lengths): directions are those of gradients that
// nobody has measured, the norm is that of all entries, and the gradient is not read a second time for it.
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "tests/optim_fixture.h"

namespace {
/// Rules, and whether they ask for lengths of matrices: not those that remember gradients, nor those that
/// divide by other lengths or by none.
struct Asking {
  const char* rule;
  bool asks;
};
constexpr Asking kRules[] = {{"steepest:norm=frobenius", true},
                             {"steepest:norm=l1-rms", true},
                             {"colnorm:norm=l1-l2", true},
                             {"sgd:normalize=1", true},
                             {"scion:norm=frobenius,radius=3,alpha=1", true},
                             {"steepest:norm=rms-linf", false},
                             {"rownorm:norm=l2-linf", false},
                             {"colnorm:norm=l1-l1.5", false},
                             {"colnorm:momentum=0.9", false},
                             {"sgd", false}};

OptimizerOptions of_rule(const std::string& rule) {
  OptimizerOptions options = everywhere(rule, "sgd:normalize=1,norm=rms");
  options.grad_clip = 0.01;  // as good as always
  return options;
}

class LengthsOn : public testing::TestWithParam<Where> {
 protected:
  static void use(Context& ctx) { GetParam() == Where::gpu ? use_gpu(ctx, 0, DType::f32) : use_cpu(ctx, 2); }
};

/// The directions of every parameter at the first step.
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
  for (const auto& [name, asks] : kRules) {
    const std::string rule = name;
    if (rule == "sgd" || rule == "colnorm:momentum=0.9")
      continue;  // their directions are no dual vectors of g
    SCOPED_TRACE(rule);
    SmallModel model(of_rule(rule), use), expected(of_rule(rule), use);
    for (SmallModel* each : {&model, &expected}) each->set_gradients(3);
    EXPECT_EQ(directions_of(model), duals_of(expected, rule.starts_with("scion") ? 3 : 1));
  }
}

TEST_P(LengthsOn, TheNormIsThatOfAllEntries) {
  for (const auto& [rule, asks] : kRules) {
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
// for none.
TEST_P(LengthsOn, TakeTheReadingOfTheNorm) {
  for (const auto& [rule, asks] : kRules) {
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
    if (asks)
      EXPECT_LT(squared, hidden / 4);
    else
      EXPECT_GE(squared, hidden);
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, LengthsOn,
                         kHaveGpu ? testing::Values(Where::cpu, Where::gpu)
                                  : testing::Values(Where::cpu, Where::cpu),
                         [](const auto& info) { return std::string(info.index == 0 ? "cpu" : "gpu"); });
}  // namespace
