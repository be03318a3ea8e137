// Sensitivities: names, masses, errors, and that Proposition 7's steps are equal once each is measured in its
// own norm and sensitivity.
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "optim/norm.h"
#include "optim/sensitivity.h"
#include "tests/optim_fixture.h"

namespace {
ModelConfig config_of(int64_t layers) {
  return {.name = "small", .L = layers, .NH = 1, .C = 16, .positions = 24, .V = 37};
}
/// Sensitivities by name.
std::map<std::string, double> by_name(const std::vector<std::string>& texts, int64_t layers = 2) {
  const ParameterTable table(config_of(layers));
  const std::vector<double> s = read_sensitivities(texts, table);
  std::map<std::string, double> found;
  for (size_t i = 0; i < s.size(); ++i) found[table.rows()[i].name] = s[i];
  return found;
}
std::string message(const std::string& text) {
  try {
    by_name({text});
  } catch (const UsageError& error) {
    return error.what();
  }
  return "";
}
}  // namespace

TEST(Sensitivity, NamesMultiply) {
  for (const auto& [name, s] : by_name({})) EXPECT_EQ(s, 1) << name;
  const auto s = by_name({"h.0.*=2", "h.*.mlp.c_proj=3", "h.?.ln_1.bias=0.5"});
  EXPECT_EQ(s.at("wte.weight"), 1);
  EXPECT_EQ(s.at("h.0.attn.c_attn.weight"), 2);
  EXPECT_EQ(s.at("h.0.mlp.c_proj.weight"), 6);
  EXPECT_EQ(s.at("h.0.mlp.c_proj.bias"), 2);
  EXPECT_EQ(s.at("h.1.mlp.c_proj.weight"), 3);
  EXPECT_EQ(s.at("h.1.ln_1.bias"), 0.5);
}

// The shares 1 / s of all matrices and vectors add up to 1, whatever the masses.
TEST(Sensitivity, MassesShareTheStep) {
  const std::string text = "masses:embedding=2,hidden=7,vector=0.25";
  for (const int64_t layers : {1, 2, 5}) {
    const ParameterTable table(config_of(layers));
    const std::vector<double> s = read_sensitivities({text}, table);
    std::map<Role, double> shares;
    for (size_t i = 0; i < s.size(); ++i) shares[table.rows()[i].role] += table.rows()[i].matrices / s[i];
    const double total = (2 + 1) + 0.5 + 7 + 0.25;  // the head's 1 goes to the tied embedding
    EXPECT_NEAR(shares.at(Role::embedding), 3 / total, 1e-12);
    EXPECT_NEAR(shares.at(Role::position), 0.5 / total, 1e-12);
    EXPECT_NEAR(shares.at(Role::hidden), 7 / total, 1e-12);
    EXPECT_NEAR(shares.at(Role::vector), 0.25 / total, 1e-12);
  }
}

TEST(Sensitivity, DepthDropsOutWhereBranchesAreAveraged) {
  const auto hidden = [](int64_t layers, const std::string& residual) {
    return by_name({"masses:residual=" + residual}, layers).at("h.0.mlp.c_fc.weight");
  };
  EXPECT_NEAR(hidden(2, "0.25"), hidden(4, "0.125"), 1e-12);
  EXPECT_NEAR(hidden(2, "0.25"), hidden(8, "0.0625"), 1e-12);
  EXPECT_NEAR(2 * hidden(2, "1"), hidden(4, "1"), 1e-12);  // branches that are added: it does not
}

TEST(Sensitivity, FusedMatricesAndNamesOnTopOfMasses) {
  const auto plain = by_name({"masses"}), third = by_name({"masses:qkv=0.25", "h.1.*=2"});
  EXPECT_NEAR(third.at("h.0.attn.c_attn.weight"), plain.at("h.0.attn.c_attn.weight") / 4, 1e-12);
  EXPECT_NEAR(third.at("h.1.attn.c_attn.weight"), plain.at("h.1.attn.c_attn.weight") / 2, 1e-12);
  EXPECT_NEAR(third.at("h.1.mlp.c_fc.weight"), plain.at("h.1.mlp.c_fc.weight") * 2, 1e-12);
  EXPECT_EQ(third.at("wte.weight"), plain.at("wte.weight"));
}

TEST(Sensitivity, ErrorsSayWhatToDo) {
  for (const char* text :
       {"nonsense", "=2", "h.0.*=", "h.0.*=0", "h.0.*=-1", "h.0.*=nan", "h.0.*=inf", "h.0.*=2x"})
    EXPECT_NE(message(text).find("write PATTERN=VALUE"), std::string::npos) << text;
  EXPECT_NE(message("lm_head=2").find("matches no tensor"), std::string::npos);
  EXPECT_NE(message("masses:hiden=2").find("hidden"), std::string::npos);
  EXPECT_NE(message("masses:hidden=0").find("hidden"), std::string::npos);
}

// Proposition 7 with several norms and sensitivities by rule, by name and by mass: s_l ||dW_l||_l is the same
// for every matrix and vector, and is sum_l ||G_l||_l^dual / s_l / sharpness.
TEST(Sensitivity, EqualStepsUnderASharpness) {
  std::vector<UseDevice> devices{on_cpu};
  if constexpr (kHaveGpu) devices.push_back([](Context& ctx) { use_gpu(ctx, 0, DType::f32); });
  OptimizerOptions options = everywhere("spectral:ns=svd,scale=rms", "sign");
  options.rules[Role::embedding] = options.rules[Role::position] = "colnorm:s=2";
  options.overrides = {{"h.1.mlp.c_proj", "rownorm:s=3"}, {"h.0.mlp.c_fc", "sgd:normalize=1"}};
  options.sensitivities = {"masses:hidden=3", "wte=0.5", "h.0.*=2"};
  options.sharpness = 10;
  for (const UseDevice use : devices) {
    SmallModel model(options, use);
    CpuContext host;
    for (const Parameter& p : model.table) upload(model.ctx, p.value, Matrix(1, p.size()));
    model.set_gradients(0);
    std::map<std::string, Matrix> gradients;
    for (const Parameter& p : model.table) gradients[p.name] = download(model.ctx, p.grad);
    model.optimizer.step(0, 20);
    double eta = 0;
    std::vector<double> lengths;
    for (const RowStep& row : model.optimizer.last_steps()) {
      const Parameter& p = *row.parameter;
      Matrix moved = download(model.ctx, p.value);
      for (int i = 0; i < p.matrices; ++i) {
        const int64_t n = p.size() / p.matrices;
        const Shape shape = p.is_matrix() ? Shape{p.shape[0] / p.matrices, p.shape[1]} : p.shape;
        const Tensor w(moved.data.data() + i * n, shape), g(gradients.at(p.name).data.data() + i * n, shape);
        eta += dual_norm(host, row.norm, g, p.stored_transposed()) / row.sensitivity / options.sharpness;
        lengths.push_back(row.sensitivity * norm(host, row.norm, w, p.stored_transposed()));
      }
    }
    EXPECT_NEAR(model.optimizer.report().lr / eta, 1, 1e-5);
    for (const double length : lengths) EXPECT_NEAR(length / eta, 1, 1e-5);
  }
}
