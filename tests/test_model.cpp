// The whole model against the golden GPT-2 set (float64, see tests/data/README.md), at the tolerances of its
// "use" column: the outer limits miss real mistakes such as an erf GELU or a wrong epsilon. On the CPU, and
// through the CUDA halves where the binary has them.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "data/loader.h"
#include "json_text.h"
#include "model/checkpoint.h"
#include "model/gpt.h"
#include "optim/optimizer.h"

namespace {
using nlohmann::json;

const std::string kGolden = "tests/data/golden_gpt2";
constexpr int64_t B = 7, T = 19;

json read_expected() {
  std::ifstream file(kGolden + "/expected.json");
  return require_json(std::string(std::istreambuf_iterator<char>(file), {}));
}

void use(Context& ctx, Where where, int threads = 2, DType dtype = DType::f32) {
  where == Where::cpu ? use_cpu(ctx, threads) : use_gpu(ctx, 0, dtype);
}

/// The devices of this binary.
auto devices() {
  return testing::ValuesIn(kHaveGpu ? std::vector{Where::cpu, Where::gpu} : std::vector{Where::cpu});
}
std::string device_name(Where where) {
  return where == Where::cpu ? "Cpu" : "Gpu";
}

/// Values of a tensor, wherever it lives.
std::vector<float> values_of(const ParameterTable& table, const Tensor& t) {
  const OnHost host(table.context(), t);
  return {host->floats().begin(), host->floats().end()};
}

/// The golden model and its data.
struct Golden {
  json expected = read_expected();
  Context ctx;
  ModelConfig config = load_config(kGolden);
  Gpt model;
  Shards shards{kGolden + "/tokens.bin", config.V};
  std::vector<int32_t> inputs, targets;

  explicit Golden(Where where, int threads = 2, DType dtype = DType::f32)
      : model((use(ctx, where, threads, dtype), ctx), config, 2 * B * T, /*training=*/true) {
    model.allocate();
    load_parameters(kGolden, model.parameters());
  }
  /// Rows of the golden stream: `rows` x T tokens from row `first`.
  void read(int64_t first, int64_t rows) {
    const Loader loader(shards, {.rows = 1, .T = T});
    inputs.resize(static_cast<size_t>(rows * T));
    targets.resize(inputs.size());
    loader.fill_chunks(first, rows, inputs.data(), targets.data());
  }
  Tensor tokens() { return {inputs.data(), {static_cast<int64_t>(inputs.size()) / T, T}}; }
  Tensor next() { return {targets.data(), {static_cast<int64_t>(inputs.size()) / T, T}}; }
  std::vector<float> values(const Tensor& t) const { return values_of(model.parameters(), t); }
};

double norm(std::span<const float> values) {
  double sum = 0;
  for (const float x : values) sum += static_cast<double>(x) * x;
  return std::sqrt(sum);
}

/// A tensor in Hugging Face's layout: linear weights (in, out).
std::vector<float> on_disk(const Parameter& p, const std::vector<float>& values) {
  if (!p.transposed_on_disk) return values;
  const auto out = static_cast<size_t>(p.shape[0]), in = static_cast<size_t>(p.shape[1]);
  std::vector<float> turned(values.size());
  for (size_t o = 0; o < out; ++o)
    for (size_t i = 0; i < in; ++i) turned[i * out + o] = values[o * in + i];
  return turned;
}

/// sum_i x_i cos(i): sees every element and its place.
double probe(std::span<const float> values) {
  double sum = 0;
  for (size_t i = 0; i < values.size(); ++i) sum += values[i] * std::cos(static_cast<double>(i));
  return sum;
}

class Model : public testing::TestWithParam<Where> {};
INSTANTIATE_TEST_SUITE_P(On, Model, devices(), [](const auto& info) { return device_name(info.param); });
}  // namespace

TEST_P(Model, LossLogitsAndTokenLosses) {
  Golden golden(GetParam());
  const json& expected = golden.expected["batch0"];
  golden.read(0, B);
  const double loss = golden.model.forward(golden.tokens(), golden.next());
  EXPECT_NEAR(loss / expected["loss"].get<double>(), 1.0, 1e-6);
  const std::vector<float> losses = golden.values(golden.model.token_losses());
  for (size_t b = 0; b < B; ++b)
    for (size_t t = 0; t < T; ++t)
      EXPECT_NEAR(losses[b * T + t], expected["per_token_loss"][b][t].get<double>(), 5e-5);

  const int64_t V = golden.config.V, Vp = golden.config.padded_V();
  std::vector<float> logits(static_cast<size_t>(B * T * Vp));
  golden.model.all_logits(golden.tokens(), Tensor(logits.data(), {B * T, Vp}));
  const auto check = [&](const json& entry, int64_t position) {
    const json& row = entry["values"];
    double largest = 0, difference = 0;
    ASSERT_EQ(row.size(), static_cast<size_t>(V));
    for (int64_t v = 0; v < V; ++v) {
      const double want = row[static_cast<size_t>(v)];
      largest = std::max(largest, std::abs(want));
      difference = std::max(difference, std::abs(want - logits[static_cast<size_t>(position * Vp + v)]));
    }
    EXPECT_LT(difference / largest, 2e-5);
  };
  check(expected["logits"]["first"], 0);
  check(expected["logits"]["last"], B * T - 1);

  std::vector<float> last(static_cast<size_t>(B * Vp));
  golden.model.next_token_logits(golden.tokens(), Tensor(last.data(), {B, Vp}));
  for (int64_t v = 0; v < V; ++v)
    EXPECT_NEAR(last[static_cast<size_t>((B - 1) * Vp + v)],
                logits[static_cast<size_t>((B * T - 1) * Vp + v)], 1e-5);
}

TEST_P(Model, ATextThatGrowsGivesTheSameLogits) {
  Golden training(GetParam());
  training.read(0, 1);
  const int64_t Vp = training.config.padded_V();
  Gpt one_row(training.ctx, training.config, T, /*training=*/false);
  one_row.allocate();
  load_parameters(kGolden, one_row.parameters());
  Gpt many_rows(training.ctx, training.config, 2 * training.config.positions, /*training=*/false);
  EXPECT_FALSE(many_rows.can_extend());
  std::vector<float> whole(static_cast<size_t>(T * Vp)), grown(static_cast<size_t>(Vp));
  training.model.all_logits(training.tokens(), Tensor(whole.data(), {T, Vp}));
  for (Gpt* model : {&training.model, &one_row}) {
    ASSERT_TRUE(model->can_extend());
    int64_t known = 0;
    for (const int64_t length : {1, 2, 3, 9, 10, 19}) {
      model->next_token_logits(Tensor(training.inputs.data(), {1, length}), Tensor(grown.data(), {1, Vp}),
                               known);
      for (int64_t v = 0; v < training.config.V; ++v)
        ASSERT_NEAR(grown[static_cast<size_t>(v)], whole[static_cast<size_t>((length - 1) * Vp + v)], 1e-5)
            << length;
      known = length;
    }
  }
}

TEST_P(Model, EveryBiasIsUsed) {
  Golden golden(GetParam());
  for (Parameter& p : golden.model.parameters())
    if (p.name.ends_with(".bias")) {
      OnHost host(golden.ctx, p.value);
      std::ranges::fill(host->floats(), 0.0f);
      host.store();
    }
  golden.read(0, B);
  const double loss = golden.model.forward(golden.tokens(), golden.next());
  EXPECT_NEAR(loss / golden.expected["checks"]["loss_batch0_with_every_bias_zero"].get<double>(), 1.0, 1e-6);
}

TEST_P(Model, Gradients) {
  Golden golden(GetParam());
  golden.read(0, B);
  golden.model.forward_backward(golden.tokens(), golden.next(), 1.0, false);
  const SafetensorsReader reference(kGolden + "/grads.safetensors");
  double total = 0;
  for (const Parameter& p : golden.model.parameters()) {
    SCOPED_TRACE(p.name);
    std::vector<float> want(static_cast<size_t>(p.size()));
    reference.read(p.name, {p.name, Tensor(want.data(), p.shape), p.transposed_on_disk});
    std::vector<float> difference(want.size());
    const std::vector<float> got = golden.values(p.grad);
    for (size_t i = 0; i < want.size(); ++i) difference[i] = got[i] - want[i];
    total += norm(got) * norm(got);
    EXPECT_LT(norm(difference) / norm(want), 1e-4);
    const json& row = golden.expected["batch0"]["grads"][p.name];
    EXPECT_NEAR(probe(on_disk(p, got)), row["probe"].get<double>(), 1e-4 * row["norm"].get<double>());
  }
  EXPECT_NEAR(std::sqrt(total) / golden.expected["batch0"]["grad_global_norm"].get<double>(), 1.0, 1e-5);
  const Parameter& wpe = golden.model.parameters().at("wpe.weight");  // positions past T are not used
  const std::vector<float> dwpe = golden.values(wpe.grad);
  for (size_t i = T * static_cast<size_t>(golden.config.C); i < dwpe.size(); ++i) EXPECT_EQ(dwpe[i], 0.0f);
  const Parameter& wte = golden.model.parameters().at("wte.weight");  // padding of the vocabulary never moves
  const std::vector<float> dwte = golden.values(wte.padded_grad());
  for (auto i = static_cast<size_t>(wte.size()); i < dwte.size(); ++i) EXPECT_EQ(dwte[i], 0.0f);
}

TEST_P(Model, MicroBatchesAddUpToTheLargeBatch) {
  Golden whole(GetParam()), split(GetParam());
  whole.read(0, 2 * B);
  const double large = whole.model.forward_backward(whole.tokens(), whole.next(), 1.0, false);
  double small = 0;
  for (int64_t i = 0; i < 2; ++i) {
    split.read(i * B, B);
    small += 0.5 * split.model.forward_backward(split.tokens(), split.next(), 0.5, i > 0);
  }
  EXPECT_NEAR(small, large, 1e-6 * large);
  for (const Parameter& p : whole.model.parameters()) {
    const std::vector<float> a = whole.values(p.grad),
                             b = split.values(split.model.parameters().at(p.name).grad);
    const double size = norm(a) + 1e-4;  // the key bias has a gradient of rounding errors only
    for (size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 2e-6 * size) << p.name << " " << i;
  }
}

TEST_P(Model, ShortSequencesAndOneThread) {
  Golden golden(GetParam(), 1);
  golden.read(0, B);
  const Tensor one_token(golden.inputs.data(), {B, 1}), one_target(golden.targets.data(), {B, 1});
  EXPECT_TRUE(std::isfinite(golden.model.forward_backward(one_token, one_target, 1.0, false)));
  EXPECT_THROW(
      golden.model.forward(Tensor(golden.inputs.data(), {1, 23}), Tensor(golden.targets.data(), {1, 23})),
      ShapeError);  // 22 positions
}

TEST_P(Model, NanInAWeightReachesTheLoss) {
  Golden golden(GetParam());
  golden.read(0, B);
  OnHost weight(golden.ctx, golden.model.parameters().at("h.1.mlp.c_fc.weight").value);
  weight->f32()[5] = std::nanf("");
  weight.store();
  EXPECT_TRUE(std::isnan(golden.model.forward(golden.tokens(), golden.next())));
}

/// One trajectory: eight steps of an optimizer, batch s at step s.
struct GoldenRun {
  const char* name;
  std::map<Role, std::string> rules;
  double grad_clip = 0;
  int64_t micro_batches = 1;
  double loss_tolerance = 2e-5, norm_tolerance = 2e-5, probe_tolerance = 5e-5;
  bool null_directions = false;  // exact polar factors of singular weights: see the golden README
};

void PrintTo(const GoldenRun& t, std::ostream* out) {
  *out << t.name;
}

class Trajectories : public testing::TestWithParam<std::tuple<GoldenRun, Where>> {};

TEST_P(Trajectories, FollowTheGoldenRun) {
  const auto& [run, where] = GetParam();
  Golden golden(where);
  const json& expected = golden.expected["trajectories"][run.name];
  ASSERT_TRUE(expected.is_object());
  Optimizer optimizer(golden.ctx, golden.model.parameters(),
                      {.rules = run.rules, .grad_clip = run.grad_clip});
  optimizer.allocate();
  const int64_t steps = 8;
  for (int64_t step = 0; step < steps; ++step) {
    double loss = 0;
    for (int64_t i = 0; i < run.micro_batches; ++i) {
      golden.read((step * run.micro_batches + i) * B, B);
      const double share = 1.0 / static_cast<double>(run.micro_batches);
      loss += share * golden.model.forward_backward(golden.tokens(), golden.next(), share, i > 0);
    }
    EXPECT_NEAR(loss / expected["loss"][static_cast<size_t>(step)].get<double>(), 1.0, run.loss_tolerance)
        << step;
    optimizer.step(step, steps);
    const StepReport report = optimizer.report(optimizer.mark());
    EXPECT_NEAR(report.grad_norm / expected["grad_global_norm"][static_cast<size_t>(step)].get<double>(), 1.0,
                2e-4);
  }
  golden.read(0, B);
  EXPECT_NEAR(
      golden.model.forward(golden.tokens(), golden.next()) / expected["loss_batch0_after"].get<double>(), 1.0,
      run.loss_tolerance);
  for (const Parameter& p : golden.model.parameters()) {
    SCOPED_TRACE(p.name);
    if (p.name.ends_with(
            "c_attn.bias")) {  // its middle third, the key bias, has a gradient of rounding errors only
      const int64_t C = p.size() / 3;
      for (const auto& [third, at] : {std::pair{"[q]", 0}, std::pair{"[v]", 2}})
        EXPECT_NEAR(norm(golden.values(p.value.slice(at * C, C))) /
                        expected["final_norms"][p.name + third].get<double>(),
                    1.0, run.norm_tolerance);
      continue;
    }
    const bool null_tensor =
        run.null_directions && (p.name.ends_with("c_attn.weight") || p.name.ends_with("c_proj.weight"));
    const double want = expected["final_norms"][p.name];
    EXPECT_NEAR(norm(golden.values(p.value)) / want, 1.0, null_tensor ? 2e-3 : run.norm_tolerance);
    if (null_tensor) continue;
    // Orthogonalised noise in null directions reaches the embeddings' probes: the golden float64 program
    // itself, given relative gradient noise of 1e-7 to 1e-6, moves wpe's by up to 2e-4 and wte's by 8e-5 of
    // the norm ("modular").
    const bool fed_by_null =
        run.name == std::string("modular") && (p.name == "wpe.weight" || p.name == "wte.weight");
    EXPECT_NEAR(probe(on_disk(p, golden.values(p.value))), expected["final_probes"][p.name].get<double>(),
                (fed_by_null ? 3e-4 : run.probe_tolerance) * want);
  }
}

std::map<Role, std::string> same(const std::string& matrices, const std::string& vectors) {
  return {{Role::hidden, matrices},
          {Role::embedding, matrices},
          {Role::position, matrices},
          {Role::vector, vectors}};
}

std::map<Role, std::string> muon_with(const std::string& polynomial) {
  const std::string other = "adam:lr=0.003,beta1=0.8,beta2=0.95,eps=1e-10";
  auto rules = same(other, other);
  rules[Role::hidden] = "muon:lr=0.02,momentum=0.95,scale=keller,ns=" + polynomial;
  return rules;
}

const auto kAdamw =
    same("adam:lr=0.001,beta1=0.9,beta2=0.95,eps=1e-8,wd=0.1", "adam:lr=0.001,beta1=0.9,beta2=0.95,eps=1e-8");

INSTANTIATE_TEST_SUITE_P(
    Golden, Trajectories,
    testing::Combine(
        testing::Values(GoldenRun{.name = "adamw", .rules = kAdamw},
                        GoldenRun{.name = "adamw_clip", .rules = kAdamw, .grad_clip = 1},
                        GoldenRun{.name = "adamw_accum2", .rules = kAdamw, .micro_batches = 2},
                        GoldenRun{.name = "signsgd",
                                  .rules = same("sign:lr=0.001", "sign:lr=0.001"),
                                  .loss_tolerance = 1e-4,
                                  .probe_tolerance = 2e-3},
                        GoldenRun{.name = "muon_ns5", .rules = muon_with("keller5")},
                        GoldenRun{.name = "muon_svd", .rules = muon_with("svd"), .null_directions = true},
                        GoldenRun{.name = "modular",
                                  .rules = {{Role::hidden, "muon:lr=0.02,momentum=0,ns=svd,scale=rms"},
                                            {Role::embedding, "colnorm:lr=0.02"},
                                            {Role::position, "colnorm:lr=0.02"},
                                            {Role::vector, "sign:lr=0.02"}},
                                  .null_directions = true}),
        devices()),
    [](const auto& info) { return std::get<0>(info.param).name + device_name(std::get<1>(info.param)); });

// ---------------------------------------------------------------------------------------------- bf16 on a
// GPU

namespace {
/// Cosine and ratio of norms of two tensors: what rounding does to a whole, where elements are too noisy to
/// compare.
void expect_alike(std::span<const float> got, std::span<const float> want, double cosine, double ratio) {
  double product = 0;
  for (size_t i = 0; i < want.size(); ++i) product += static_cast<double>(got[i]) * want[i];
  EXPECT_GT(product / (norm(got) * norm(want)), cosine);
  EXPECT_NEAR(norm(got) / norm(want), 1.0, ratio);
}

/// Loss and gradients of a model with heads of 64 channels, whose attention runs on tensor cores in bf16.
struct SmallHeads {
  Context ctx;
  ModelConfig config{.name = "test", .L = 2, .NH = 2, .C = 128, .positions = 96, .V = 301};
  Gpt model;
  double loss;
  SmallHeads(Where where, DType dtype)
      : model((use(ctx, where, 2, dtype), ctx), config, 3 * 70, /*training=*/true) {
    model.allocate();
    model.parameters().initialize(11);
    std::vector<int32_t> inputs, targets;
    for (int32_t i = 0; i < 3 * 70; ++i)
      inputs.push_back(i * i % 301), targets.push_back((i * i + 7 * i) % 301);
    loss =
        model.forward_backward(Tensor(inputs.data(), {3, 70}), Tensor(targets.data(), {3, 70}), 1.0, false);
  }
};
}  // namespace

TEST(ModelInBf16, FollowsFloat32) {
  if (!kHaveGpu) GTEST_SKIP() << "bf16 is for GPUs, and this binary has no CUDA";
  const SmallHeads exact(Where::cpu, DType::f32), rounded(Where::gpu, DType::bf16),
      same(Where::gpu, DType::f32);
  EXPECT_NEAR(same.loss / exact.loss, 1.0, 1e-6);
  EXPECT_NEAR(rounded.loss / exact.loss, 1.0, 1e-3);
  for (const Parameter& p : exact.model.parameters()) {
    SCOPED_TRACE(p.name);
    const std::vector<float> want = values_of(exact.model.parameters(), p.grad);
    const auto of = [&](const SmallHeads& m) {
      return values_of(m.model.parameters(), m.model.parameters().at(p.name).grad);
    };
    // The key bias shifts all scores of a query alike, so its gradient is rounding errors only.
    const auto part = [&](const std::vector<float>& v) {
      return std::span(v).subspan(p.name.ends_with("c_attn.bias") ? v.size() / 3 * 2 : 0);
    };
    expect_alike(part(of(same)), part(want), 1 - 1e-9, 1e-5);
    expect_alike(part(of(rounded)), part(want), 0.999, 0.01);
  }
}
