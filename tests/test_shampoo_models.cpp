// shampoo, oneside and soap in the optimizer of a small model, on the CPU and on a GPU, or in the executor.
#include <gtest/gtest.h>
#include <cmath>
#include <numeric>
#include "model/kernels/stream.h"
#include "optim/pieces.h"
#include "optim/svd.h"
#include "tests/optim_fixture.h"

namespace {
/// Everywhere where there are matrices, with pieces of several sizes.
std::vector<OptimizerOptions> in_models() {
  std::vector<OptimizerOptions> list;
  for (const char* rule :
       {"shampoo:freq=3,block=12", "shampoo:freq=2,root=newton",
        "shampoo:freq=1,accumulate=sum,graft=adagrad", "shampoo:accumulate=none", "oneside", "soap:freq=2"})
    list.push_back(everywhere(rule, "sgd:momentum=0.9"));
  return list;
}
void copy_to(SmallModel& to, SmallModel& from) {
  for (size_t i = 0; i < from.table.rows().size(); ++i)
    upload(to.ctx, to.table.rows()[i].value, download(from.ctx, from.table.rows()[i].value));
  const auto sources = from.optimizer.state(), targets = to.optimizer.state();
  ASSERT_EQ(sources.size(), targets.size());
  for (size_t i = 0; i < sources.size(); ++i) {
    ASSERT_EQ(sources[i].name, targets[i].name);
    upload(to.ctx, targets[i].value, download(from.ctx, sources[i].value));
  }
}
}  // namespace

// The direction is of the size of g / (sqrt(sum of g^2) + eps), whatever Shampoo makes of it.
TEST(ShampooInModels, AdaGradGivesTheSize) {
  for (const UseDevice use : both_devices()) {
    RuleDriver driver("shampoo:freq=1,graft=adagrad,graft_eps=0.01", {random_matrix(5, 3, 1)},
                      /*transposed=*/false, use);
    std::vector<double> sums(15);
    for (uint32_t t = 0; t < 6; ++t) {
      const Matrix g = random_matrix(5, 3, 10 + t, t % 2 == 0 ? 1.0f : 0.1f);
      double squares = 0;
      for (size_t i = 0; i < sums.size(); ++i) {
        const double x = g.data[i];
        sums[i] += x * x;
        squares += std::pow(x / (std::sqrt(sums[i]) + 0.01), 2);
      }
      driver.step({g});
      const Matrix u = driver.direction();
      EXPECT_NEAR(std::sqrt(inner(u, u) / squares), 1, 1e-5) << t;
    }
  }
}

TEST(ShampooInModels, ResumeIsBitwise) {
  for (const UseDevice use : both_devices())
    for (const OptimizerOptions& options : in_models()) {
      SCOPED_TRACE(options.rules.at(Role::hidden));
      SmallModel whole(options, use, 15), first(options, use, 15), second(options, use, 15);
      for (int64_t t = 0; t < 4; ++t) whole.step(t);
      for (int64_t t = 0; t < 2; ++t) first.step(t);
      copy_to(second, first);
      for (int64_t t = 2; t < 4; ++t) second.step(t);
      EXPECT_EQ(whole.weights(), second.weights());
      EXPECT_EQ(whole.state(), second.state());
    }
}

TEST(ShampooInModels, NonFiniteGradientChangesNothing) {
  for (const UseDevice use : both_devices())
    for (const OptimizerOptions& options : in_models()) {
      SCOPED_TRACE(options.rules.at(Role::hidden));
      SmallModel model(options, use, 15);
      model.step(0);
      const auto weights = model.weights(), state = model.state();
      const Tensor poisoned = model.table.at("h.1.mlp.c_fc.weight").grad;
      for (const int64_t t : {2, 3}) {  // roots and bases would be renewed
        model.set_gradients(t);
        Matrix grad = download(model.ctx, poisoned);
        grad.data[5] = std::nanf("");
        upload(model.ctx, poisoned, grad);
        model.optimizer.step(t, 20);
        EXPECT_EQ(model.weights(), weights);
        EXPECT_EQ(model.state(), state);
      }
      EXPECT_THROW(model.optimizer.report(), RunError);
      model.step(4);
      for (const float w : model.weights()) ASSERT_TRUE(std::isfinite(w));
    }
}

TEST(ShampooInModels, ClippingScalesGradients) {
  for (const UseDevice use : both_devices())
    for (const char* rule :
         {"shampoo:eps=1e-6,freq=1", "oneside:graft=sgd,eps=1e-6", "soap:eps=1e-3,max_side=16",
          "shampoo:accumulate=sum,graft=none,freq=2,eps=1e-6"}) {
      SCOPED_TRACE(rule);
      OptimizerOptions options = everywhere(rule, "sgd");
      for (auto& [role, text] : options.rules)
        if (role != Role::hidden) text = "sgd";
      options.schedule = parse_schedule("--schedule", "constant");
      SmallModel plain(options, use);
      options.grad_clip = 0.05;
      SmallModel clipped(options, use);
      for (int64_t t = 0; t < 4; ++t) {
        const StepReport report = clipped.step(t);
        plain.set_gradients(t);
        for (const Parameter& p : plain.table)
          upload(plain.ctx, p.grad,
                 scaled(download(plain.ctx, p.grad), static_cast<float>(report.clip_scale)));
        plain.optimizer.step(t, 20);
      }
      const auto a = plain.weights(), b = clipped.weights();
      for (size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 2e-5);
    }
}

TEST(ShampooInModels, StateIsNamed) {
  const auto shape_of = [](SmallModel& model, const std::string& name) {
    for (const NamedTensor& tensor : model.optimizer.state())
      if (tensor.name == name) return tensor.value.shape;
    return Shape{};
  };
  SmallModel shampoo(everywhere("shampoo", "sgd"));
  EXPECT_EQ(shape_of(shampoo, "h.0.mlp.c_fc.weight.L"), (Shape{64, 64}));
  EXPECT_EQ(shape_of(shampoo, "h.0.mlp.c_fc.weight.R_root"), (Shape{16, 16}));
  EXPECT_EQ(shape_of(shampoo, "h.0.attn.c_attn.weight.R"), (Shape{48, 16}));  // three matrices
  SmallModel cut(everywhere("shampoo:block=24,freq=1", "sgd"));
  EXPECT_EQ(shape_of(cut, "h.0.mlp.c_fc.weight.L"), (Shape{24 * 24 * 2 + 16 * 16}));
  EXPECT_EQ(shape_of(cut, "h.0.mlp.c_fc.weight.R"), (Shape{3 * 16 * 16}));
  EXPECT_EQ(shape_of(cut, "h.0.mlp.c_fc.weight.L_root"), Shape{});
  SmallModel one(everywhere("oneside", "sgd"));
  EXPECT_EQ(shape_of(one, "h.0.mlp.c_fc.weight.L"), Shape{});
  EXPECT_EQ(shape_of(one, "h.0.mlp.c_fc.weight.R"), (Shape{16, 16}));
  SmallModel soap(everywhere("soap:max_side=32", "sgd"));
  EXPECT_EQ(shape_of(soap, "h.0.mlp.c_fc.weight.L_basis"), Shape{});
  EXPECT_EQ(shape_of(soap, "h.0.mlp.c_fc.weight.R_basis"), (Shape{16, 16}));
}

// Only roots by products leave the steps to the GPU; then they may be captured, also where some do more than
// others.
TEST(ShampooInModels, StepsAsGraphs) {
  for (const UseDevice use : both_devices()) {
    EXPECT_FALSE(SmallModel(everywhere("shampoo", "sgd"), use).optimizer.capturable());
    EXPECT_FALSE(SmallModel(everywhere("soap", "sgd"), use).optimizer.capturable());
    const OptimizerOptions options = everywhere("shampoo:root=newton,freq=2,block=12", "sgd");
    SmallModel direct(options, use, 15), captured(options, use, 15);
    EXPECT_TRUE(captured.optimizer.capturable());
    StepGraph graph(captured.ctx, captured.optimizer.capturable());
    for (int64_t t = 0; t < 5; ++t) {
      captured.set_gradients(t);
      graph.run([&] { captured.optimizer.step(t, 20); });
      captured.optimizer.report(captured.optimizer.mark());
      direct.step(t);
    }
    EXPECT_EQ(captured.weights(), direct.weights());
    EXPECT_EQ(captured.state(), direct.state());
  }
}
