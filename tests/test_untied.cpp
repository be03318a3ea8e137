// A head with a weight of its own, held against the tied model: with equal weights both compute the same, and
// the gradient of the tied tensor is the sum of the two. On the CPU, and through the CUDA halves where the
// binary has them.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "model/checkpoint.h"
#include "model/gpt.h"
#include "model/gpt2_config.h"
#include "tests/temporary_folder.h"

namespace {
constexpr int64_t B = 2, T = 13;

ModelConfig small(bool tied) {
  return {.name = "small", .L = 2, .NH = 2, .C = 16, .positions = 16, .V = 37, .tied = tied};
}

class Untied : public testing::TestWithParam<Where> {};

struct Model {
  Context ctx;
  Gpt gpt;
  std::vector<int32_t> ids;

  Model(Where where, bool tied) : gpt((use(where), ctx), small(tied), B * T, /*training=*/true) {
    gpt.allocate();
    gpt.parameters().initialize(7);
    for (int64_t i = 0; i < 2 * B * T + 1; ++i) ids.push_back(static_cast<int32_t>(i * i * 7 % 37));
  }
  void use(Where where) { where == Where::cpu ? use_cpu(ctx, 2) : use_gpu(ctx, 0, DType::f32); }
  std::vector<float> values(const Tensor& t) {
    const OnHost host(ctx, t);
    return {host->floats().begin(), host->floats().end()};
  }
  void copy_to_head() {
    const std::vector<float> from = values(gpt.parameters().at("wte.weight").value);
    gpt.parameters().set(gpt.parameters().at("lm_head.weight"),
                         [&](float* to) { std::ranges::copy(from, to); });
  }
  double run(int64_t batch, bool accumulate) {
    int32_t* const first = ids.data() + batch * B * T;
    return gpt.forward_backward({first, {B, T}}, {first + 1, {B, T}}, 0.5, accumulate);
  }
  std::vector<float> gradient(const std::string& name) { return values(gpt.parameters().at(name).grad); }
};

TEST_P(Untied, EqualWeightsGiveTheTiedModel) {
  Model tied(GetParam(), true), untied(GetParam(), false);
  untied.copy_to_head();
  for (const int64_t batch : {0, 1}) EXPECT_EQ(tied.run(batch, batch > 0), untied.run(batch, batch > 0));
  for (const Parameter& p : tied.gpt.parameters()) {
    const std::vector<float> want = tied.gradient(p.name);
    std::vector<float> got = untied.gradient(p.name);
    if (p.role == Role::embedding) {
      const std::vector<float> head = untied.gradient("lm_head.weight");
      EXPECT_NE(head, want);
      EXPECT_NE(got, want);
      std::ranges::transform(got, head, got.begin(), std::plus());
    }
    ASSERT_EQ(got.size(), want.size());
    for (size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], want[i], 1e-6) << p.name << " " << i;
  }
}

TEST_P(Untied, TheHeadAloneReadsItsWeight) {
  Model untied(GetParam(), false);
  const double before = untied.run(0, false);
  Parameter& head = untied.gpt.parameters().at("lm_head.weight");
  EXPECT_EQ(head.role, Role::head);
  EXPECT_FALSE(head.stored_transposed());
  untied.gpt.parameters().set(head, [&](float* to) { std::fill_n(to, head.size(), 0.0f); });
  EXPECT_NEAR(untied.run(0, false), std::log(37.0), 1e-6);  // all logits 0
  EXPECT_NE(before, std::log(37.0));
  const std::vector<float> wte = untied.gradient("wte.weight");  // nothing flows back through a head of zeros
  EXPECT_TRUE(std::ranges::all_of(wte, [](float x) { return x == 0; }));
}

/// The folder of a checkpoint of this model.
std::string save(Gpt& gpt, const TemporaryFolder& folder) {
  return save_checkpoint({.out = folder.path(),
                          .step = 1,
                          .config = gpt.config(),
                          .parameters = gpt.parameters(),
                          .optimizer = {},
                          .state = nlohmann::json::object()});
}

TEST_P(Untied, CheckpointsHoldTheHead) {
  const TemporaryFolder folder;
  Model untied(GetParam(), false);
  const std::string saved = save(untied.gpt, folder);
  const ModelConfig config = load_config(saved);
  EXPECT_FALSE(config.tied);
  Model loaded(GetParam(), false);
  loaded.gpt.parameters().initialize(8);
  load_parameters(saved, loaded.gpt.parameters());
  for (const Parameter& p : untied.gpt.parameters())
    EXPECT_EQ(untied.values(p.value), loaded.values(loaded.gpt.parameters().at(p.name).value)) << p.name;
  Model tied(GetParam(), true);
  EXPECT_THROW(load_parameters(saved, tied.gpt.parameters()), std::runtime_error);
}

TEST_P(Untied, AHeadBeginsAsTheEmbeddingOfATiedFile) {
  const TemporaryFolder folder;
  Model tied(GetParam(), true), untied(GetParam(), false);
  const std::string saved = save(tied.gpt, folder);
  load_parameters(saved, untied.gpt.parameters());
  EXPECT_EQ(untied.values(untied.gpt.parameters().at("lm_head.weight").value),
            tied.values(tied.gpt.parameters().at("wte.weight").value));
  EXPECT_EQ(untied.run(0, false), tied.run(0, false));
}

TEST(UntiedConfig, IsReadBack) {
  EXPECT_TRUE(parse_model("gpt2-nano").tied);
  EXPECT_FALSE(parse_model("gpt2-nano:tied=0").tied);
  for (const bool tied : {true, false})
    EXPECT_EQ(parse_gpt2_config(gpt2_config_json(small(tied)), "config.json").tied, tied);
}

INSTANTIATE_TEST_SUITE_P(Devices, Untied,
                         testing::ValuesIn(kHaveGpu ? std::vector{Where::cpu, Where::gpu}
                                                    : std::vector{Where::cpu}),
                         [](const auto& info) { return info.param == Where::cpu ? "Cpu" : "Gpu"; });
}  // namespace
