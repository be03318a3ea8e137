// The optimizer on several ranks, threads of one process: each keeps and moves what it owns, and together
// they make the steps of one.
#include <gtest/gtest.h>

#include <cstring>
#include <map>

#include "model/config.h"
#include "tests/optim_fixture.h"
#include "tests/rank_threads.h"

namespace {
constexpr int64_t kSteps = 4;
const int kRanks[] = {1, 2, 3, 4, 8};

/// One thread per rank, so that products are cut up the same way everywhere.
void on_one_thread(Context& ctx) {
  use_cpu(ctx, 1);
}

/// A tensor of state, or of all its pieces put together.
struct Whole {
  Shape shape;
  std::vector<std::byte> bytes;
  int64_t rows = 0;  // put in so far
  bool operator==(const Whole&) const = default;
};
using State = std::map<std::string, Whole>;

/// Puts a piece of state, or a whole tensor, where it belongs.
void put(State& state, const NamedTensor& tensor) {
  const Tensor& value = tensor.value;
  Whole& whole = state[tensor.name];
  const int64_t rows = tensor.all_rows < 0 ? value.shape[0] : tensor.all_rows;
  const int64_t row_bytes = value.bytes() / value.shape[0];
  whole.shape = value.shape.rank() == 2 ? Shape{rows, value.shape[1]} : Shape{rows};
  whole.bytes.resize(static_cast<size_t>(rows * row_bytes));
  std::memcpy(whole.bytes.data() + tensor.first_row * row_bytes, value.data,
              static_cast<size_t>(value.bytes()));
  whole.rows += value.shape[0];
}

/// Fills the pieces that lie here.
void take(std::span<const NamedTensor> tensors, const State& state) {
  for (const NamedTensor& tensor : tensors) {
    if (!tensor.value) continue;
    const Whole& whole = state.at(tensor.name);
    const int64_t row_bytes = tensor.value.bytes() / tensor.value.shape[0];
    std::memcpy(tensor.value.data, whole.bytes.data() + tensor.first_row * row_bytes,
                static_cast<size_t>(tensor.value.bytes()));
  }
}

/// What a run of some steps left behind.
struct Trace {
  std::vector<std::vector<float>> weights;  // after each step
  std::vector<StepReport> reports;
  State state;  // after the last
};

/// A model on one of several ranks, whose gradients are complete only at their owners.
struct RankModel : SmallModel {
  RankModel(const OptimizerOptions& options, const std::shared_ptr<Comm>& comm)
      : SmallModel(options, on_one_thread, 16, comm) {}

  bool mine(const Piece& piece) { return piece.owner == ctx.comm->rank(); }
  Tensor rows(const Tensor& whole, const Piece& piece) { return whole.slice(piece.first, piece.rows); }
  Parameter& parameter(const Piece& piece) { return table.rows()[piece.parameter]; }

  /// Nobody may look at the gradients that others own.
  void hide_others() {
    for (const Piece& piece : optimizer.owners().pieces())
      if (!mine(piece)) std::ranges::fill(rows(parameter(piece).grad, piece).floats(), std::nanf(""));
  }
  /// The owners' weights, or directions, on all ranks.
  void gather(Tensor Parameter::*tensor) {
    std::vector<Part> parts;
    for (const Piece& piece : optimizer.owners().pieces())
      parts.push_back({rows(parameter(piece).*tensor, piece), piece.owner});
    ctx.comm->finish(ctx.comm->start_all_gather(parts));
  }
  StepReport step(int64_t t) {
    set_gradients(t);
    hide_others();
    optimizer.step(t, 20);
    gather(&Parameter::value);
    return optimizer.report();
  }
  /// The state of all ranks, on one of them: each brings its pieces.
  State whole_state() {
    State state;
    for (const NamedTensor& tensor : optimizer.state()) {
      std::vector<std::byte> bytes(static_cast<size_t>(tensor.value.bytes()));
      if (tensor.value) std::memcpy(bytes.data(), tensor.value.data, bytes.size());
      // A sum of what one rank has and the others have not; exact, and -0 is 0.
      NamedTensor here = tensor;
      here.value.data = bytes.data();
      if (tensor.name != "escape_velocity") ctx.comm->finish(ctx.comm->start_sum(std::span(&here.value, 1)));
      put(state, here);
    }
    return state;
  }
};

Trace run(RankModel& model, int64_t first, int64_t end) {
  Trace trace;
  for (int64_t t = first; t < end; ++t) {
    trace.reports.push_back(model.step(t));
    trace.weights.push_back(model.weights());
  }
  trace.state = model.whole_state();
  return trace;
}

Trace alone(const OptimizerOptions& options, int64_t steps = kSteps) {
  RankModel model(options, std::make_shared<Comm>());
  return run(model, 0, steps);
}

/// Every rank's trace. No rank may fail.
std::vector<Trace> together(const OptimizerOptions& options, int ranks, int64_t steps = kSteps) {
  std::vector<Trace> traces(static_cast<size_t>(ranks));
  const auto failures = on_ranks(ranks, [&](const std::shared_ptr<Comm>& comm) {
    RankModel model(options, comm);
    traces[static_cast<size_t>(comm->rank())] = run(model, 0, steps);
  });
  for (const std::string& failure : failures) EXPECT_EQ(failure, "");
  return traces;
}

/// The largest difference over the largest number.
double difference(const std::vector<float>& a, const std::vector<float>& b) {
  Matrix x(1, std::ssize(a)), y(1, std::ssize(b));
  x.data = a, y.data = b;
  return a.size() == b.size() ? deviation(x, y) : 1e30;
}

std::vector<float> floats_of(const Whole& whole) {
  std::vector<float> values(whole.bytes.size() / 4);
  std::memcpy(values.data(), whole.bytes.data(), whole.bytes.size());
  return values;
}

/// `tolerance` 0: the same bits.
void expect_same(const Trace& got, const Trace& want, double tolerance) {
  ASSERT_EQ(got.weights.size(), want.weights.size());
  for (size_t t = 0; t < want.weights.size(); ++t) {
    if (tolerance == 0)
      EXPECT_EQ(got.weights[t], want.weights[t]) << "step " << t;
    else
      EXPECT_LE(difference(got.weights[t], want.weights[t]), tolerance) << "step " << t;
    const StepReport &a = got.reports[t], &b = want.reports[t];
    EXPECT_NEAR(a.grad_norm / b.grad_norm, 1, 1e-12);
    EXPECT_NEAR(a.clip_scale / b.clip_scale, 1, 1e-12);
    EXPECT_LE(std::fabs(a.lr - b.lr), (tolerance + 1e-12) * b.lr);
    EXPECT_LE(std::fabs(a.eta - b.eta), (tolerance + 1e-12) * b.eta);
  }
  ASSERT_EQ(got.state.size(), want.state.size());
  for (const auto& [name, whole] : want.state) {
    ASSERT_TRUE(got.state.contains(name)) << name;
    const Whole& other = got.state.at(name);
    EXPECT_EQ(other.shape, whole.shape) << name;
    EXPECT_EQ(other.rows, whole.shape[0]) << name << ": every row once";
    if (name == "escape_velocity") continue;  // f64, and reports have it
    if (tolerance == 0)
      EXPECT_EQ(floats_of(other), floats_of(whole)) << name;
    else
      EXPECT_LE(difference(floats_of(other), floats_of(whole)), 10 * tolerance) << name;  // squares, too
  }
}

/// All numbers of ranks of the same bits, and those of one process.
void check(const OptimizerOptions& options, double tolerance, std::span<const int> worlds = kRanks) {
  SCOPED_TRACE(options.rules.at(Role::hidden) + ", " + options.rules.at(Role::embedding));
  const Trace want = alone(options);
  for (const int ranks : worlds) {
    SCOPED_TRACE(std::to_string(ranks) + " ranks");
    const std::vector<Trace> traces = together(options, ranks);
    expect_same(traces[0], want, tolerance);
    for (const Trace& trace : traces) {
      EXPECT_EQ(trace.weights, traces[0].weights);
      EXPECT_EQ(trace.state, traces[0].state);
    }
  }
}

}  // namespace

// Without clipping or measuring nothing is summed over ranks but what is reported: entry by entry, row by row
// (rows of 16 fill vector registers) and matrix by matrix the arithmetic is the same. Products of batches may
// be cut up otherwise: 1e-5 for rules that are made of them, of the rounding 6e-8 after four steps. Prodigy's
// velocity is a sum over ranks.
TEST(ShardedOptimizer, EveryRuleIsThatOfOneProcess) {
  for (const RuleEntry& entry : rule_table()) {
    const std::unique_ptr<Rule> rule = make_rule("--hidden", entry.name);
    const std::string name = entry.name;
    const bool products = rule->work({.shape = {16, 16}, .blocks = {}}) > 100 * 256;
    const std::string vectors = rule->matrices_only() ? "sign" : name;
    check(everywhere(name, vectors), products || rule->escapes() ? 1e-5 : 0);
  }
}

TEST(ShardedOptimizer, EveryRecipeIsThatOfOneProcess) {
  for (const Recipe& recipe : recipe_table()) check(recipe_options(recipe.name), 1e-5);
}

TEST(ShardedOptimizer, OverridesSensitivitiesAndHyperball) {
  OptimizerOptions options = recipe_options("modular");
  options.overrides = {{"h.*.mlp.c_fc.weight", "muon:lr=0.04,s=2"},
                       {"h.1.attn.c_attn.weight", "adam:hyperball=1,lr=0.02"},
                       {"wte.weight", "sgd:momentum=0.9,nesterov=1"},
                       {"wpe.weight", "colnorm:hyperball=1"},
                       {"ln_f.*", "lion"}};
  options.sensitivities = {"h.0.*=2", "wte.weight=0.5"};
  check(options, 1e-5);
  options = everywhere("adam:wd=0.1,cautious=1", "adam");
  options.overrides = {{"h.*", "adam:lr=0.03,s=3"}};
  check(options, 0);
}

// The norm is a sum by pieces in float64, so the clip factor is the same to one rounding of float32.
TEST(ShardedOptimizer, ClipsByTheNormOfAll) {
  for (const char* rule : {"adam:eps=1e-3", "sgd:lr=0.1", "muon"}) {
    OptimizerOptions options = everywhere(rule, rule == std::string("muon") ? "adam" : rule);
    options.grad_clip = 0.05;
    check(options, 1e-5);
  }
}

// Step sizes are sums over all tensors.
TEST(ShardedOptimizer, MeasuredSteps) {
  OptimizerOptions options = everywhere("rownorm:momentum=0.5,nesterov=1", "sign");
  options.rules[Role::embedding] = "colnorm:s=3";
  options.rules[Role::position] = "sgd";
  options.sharpness = 10;
  check(options, 1e-5);
  options.grad_clip = 0.1;
  check(options, 1e-5);
  options.sharpness = 0;
  options.escape = parse_escape("--escape", "1e-3:growth=2");
  check(options, 1e-5);
  options = everywhere("spectral:ns=svd,scale=rms", "adam");
  options.rules[Role::embedding] = "adam";
  options.escape = parse_escape("--escape", "1e-3");
  check(options, 1e-5);
  for (const char* variant : {"no-ema", "package", "paper"}) {
    const std::string rule = std::string("prodigy:eta0=1e-3,variant=") + variant;
    options = everywhere(rule, rule);
    check(options, 1e-5);
  }
}

TEST(ShardedOptimizer, EmbeddingsAreCutWhereTheirRuleAllows) {
  on_ranks(4, [](const std::shared_ptr<Comm>& comm) {
    const auto pieces = [&](OptimizerOptions options, const std::string& rule) {
      options.rules[Role::embedding] = rule;
      RankModel model(options, comm);
      return model.optimizer.owners().pieces_of(0).size();
    };
    OptimizerOptions options = recipe_options("muon");
    EXPECT_EQ(pieces(options, "adam"), 4u);
    EXPECT_EQ(pieces(options, "colnorm"), 4u);
    EXPECT_EQ(pieces(options, "sgd"), 4u);
    EXPECT_EQ(pieces(options, "adam:hyperball=1"), 1u);
    EXPECT_EQ(pieces(options, "rownorm"), 1u);
    EXPECT_EQ(pieces(options, "muon"), 1u);
    options.escape = parse_escape("--escape", "1e-3");
    EXPECT_EQ(pieces(options, "sgd"), 1u);  // divides by the length of the whole then
    EXPECT_EQ(pieces(options, "adam"), 4u);
  });
}

TEST(ShardedOptimizer, StateIsKeptByItsOwnerAlone) {
  const OptimizerOptions options = recipe_options("muon");
  RankModel single(options, std::make_shared<Comm>());
  int64_t bytes = 0;
  for (const NamedTensor& tensor : single.optimizer.state()) {
    EXPECT_EQ(tensor.all_rows, -1) << "one process has whole tensors";
    bytes += tensor.value.bytes();
  }
  std::vector<int64_t> kept(4);
  std::vector<std::vector<std::string>> lists(4);
  const auto failures = on_ranks(4, [&](const std::shared_ptr<Comm>& comm) {
    RankModel model(options, comm);
    const auto r = static_cast<size_t>(comm->rank());
    for (const NamedTensor& tensor : model.optimizer.state()) {
      if (tensor.value) kept[r] += tensor.value.bytes();
      lists[r].push_back(tensor.name + " " + tensor.value.str() + " " + std::to_string(tensor.first_row) +
                         " of " + std::to_string(tensor.all_rows));
    }
    EXPECT_GE(model.optimizer.state_bytes(), kept[r]);
    EXPECT_LT(model.optimizer.state_bytes(), single.optimizer.state_bytes() / 2);
  });
  EXPECT_EQ(failures, std::vector<std::string>(4));
  EXPECT_EQ(kept[0] + kept[1] + kept[2] + kept[3], bytes);
  for (const auto& list : lists) EXPECT_EQ(list, lists[0]);
  const auto has = [&](const char* line) { return std::ranges::count(lists[0], line) == 1; };
  EXPECT_TRUE(has("wte.weight.v f32 (10, 16) 0 of 37"));
  EXPECT_TRUE(has("wte.weight.v f32 (9, 16) 28 of 37"));
  EXPECT_TRUE(has("h.0.attn.c_attn.weight.m f32 (32, 16) 0 of 48"));  // 8 C x C matrices, two for each rank
  EXPECT_TRUE(has("h.0.attn.c_attn.weight.m f32 (16, 16) 32 of 48"));
  EXPECT_TRUE(has("h.0.attn.c_proj.weight.m f32 (16, 16) 0 of -1"));
}

// Roots, factors and numbers of state are stacked by blocks.
TEST(ShardedOptimizer, ContinuesOnAnotherNumberOfRanks) {
  for (const char* rule : {"adam", "muon", "normuon", "dion", "shampoo:freq=2", "soap:freq=2",
                           "muon:hyperball=1", "prodigy:eta0=1e-3"}) {
    SCOPED_TRACE(rule);
    OptimizerOptions options = everywhere("adam", "adam");
    options.rules[Role::hidden] = rule;
    if (make_rule("--hidden", rule)->escapes()) options = everywhere(rule, rule);
    const Trace want = alone(options, 6);
    for (const auto& [before, after] : {std::pair{1, 3}, {3, 2}, {8, 1}, {2, 8}}) {
      const Trace first = together(options, before, 3)[0];
      const auto failures = on_ranks(after, [&, after = after](const std::shared_ptr<Comm>& comm) {
        RankModel model(options, comm);
        const float* from = first.weights.back().data();
        for (Parameter& p : model.table) std::copy_n(from, p.size(), p.value.f32()), from += p.size();
        take(model.optimizer.state(), first.state);
        const Trace rest = run(model, 3, 6);
        EXPECT_LE(difference(rest.weights.back(), want.weights.back()), 1e-5) << before << ", " << after;
      });
      for (const std::string& failure : failures) EXPECT_EQ(failure, "");
    }
  }
}

// A number that is not finite, in any piece, seen by its owner alone: no rank moves, all say the same.
TEST(ShardedOptimizer, NonFiniteGradientStopsAllRanks) {
  std::vector<OptimizerOptions> list = {recipe_options("muon"), recipe_options("adamw"),
                                        recipe_options("prodigy"), everywhere("rownorm", "sign")};
  list.back().sharpness = 10;
  list.push_back(everywhere("spectral", "adam"));
  list.back().escape = parse_escape("--escape", "1e-3");
  list.push_back(everywhere("shampoo", "adam"));
  for (const OptimizerOptions& options : list)
    for (const float bad : {std::nanf(""), INFINITY}) {
      SCOPED_TRACE(options.rules.at(Role::hidden));
      const auto failures = on_ranks(3, [&](const std::shared_ptr<Comm>& comm) {
        RankModel model(options, comm);
        model.step(0);
        const State state = model.whole_state();
        const auto weights = model.weights();
        for (const Piece& piece : model.optimizer.owners().pieces()) {
          model.set_gradients(1);
          model.hide_others();
          if (model.mine(piece)) model.rows(model.parameter(piece).grad, piece).f32()[5] = bad;
          model.optimizer.step(1, 20);
          std::string message;
          try {
            model.optimizer.report();
          } catch (const RunError& error) {
            message = error.what();
          }
          EXPECT_EQ(message,
                    fmt::format(
                        "the gradient of {} is not finite, step 1, lower the learning rate or clip gradients",
                        model.parameter(piece).name));
        }
        model.gather(&Parameter::value);
        EXPECT_EQ(model.weights(), weights);
        EXPECT_EQ(model.whole_state(), state);
        model.step(1);
        EXPECT_NE(model.weights(), weights);
        for (const float w : model.weights()) ASSERT_TRUE(std::isfinite(w));
      });
      for (const std::string& failure : failures) EXPECT_EQ(failure, "");
    }
}

TEST(ShardedOptimizer, SharesNumbersWithTheNorm) {
  for (const int ranks : {1, 3}) {
    const auto failures = on_ranks(ranks, [&](const std::shared_ptr<Comm>& comm) {
      RankModel model(recipe_options("adamw"), comm);
      double loss = 0, more[2] = {};
      model.optimizer.share({Tensor(&loss, {1}), Tensor(more, {2})});
      for (int64_t t = 0; t < 2; ++t) {
        loss = 1 + comm->rank(), more[0] = 10, more[1] = -comm->rank();
        model.step(t);
        EXPECT_EQ(loss, ranks * (ranks + 1) / 2);
        EXPECT_EQ(more[0], 10 * ranks);
        EXPECT_EQ(more[1], -ranks * (ranks - 1) / 2);
      }
    });
    for (const std::string& failure : failures) EXPECT_EQ(failure, "");
  }
}

TEST(ShardedOptimizer, KeepsDirectionsOfItsPieces) {
  const OptimizerOptions options = recipe_options("adamw");  // fuses unless directions are kept
  RankModel single(options, std::make_shared<Comm>());
  single.set_gradients(0);
  single.optimizer.step(0, 20, /*keep_directions=*/true);
  const auto failures = on_ranks(3, [&](const std::shared_ptr<Comm>& comm) {
    RankModel model(options, comm);
    model.set_gradients(0);
    model.hide_others();
    model.optimizer.step(0, 20, /*keep_directions=*/true);
    model.gather(&Parameter::grad);
    model.optimizer.report();
    for (size_t i = 0; i < model.table.rows().size(); ++i) {
      const Matrix got = download(model.ctx, model.table.rows()[i].grad);
      EXPECT_LT(deviation(got, download(model.ctx, single.table.rows()[i].grad)), 1e-5);
    }
    const auto steps = model.optimizer.last_steps(), want = single.optimizer.last_steps();
    ASSERT_EQ(steps.size(), want.size());  // of all tensors, whoever owns them
    for (size_t i = 0; i < steps.size(); ++i) EXPECT_EQ(steps[i].step, want[i].step);
  });
  for (const std::string& failure : failures) EXPECT_EQ(failure, "");
}

TEST(ShardedOptimizer, IsNoGraphWhereExchangesWait) {
  EXPECT_TRUE(RankModel(recipe_options("adamw"), std::make_shared<Comm>()).optimizer.capturable());
  on_ranks(1, [](const std::shared_ptr<Comm>& comm) {
    EXPECT_FALSE(RankModel(recipe_options("adamw"), comm).optimizer.capturable());
  });
}

TEST(ShardedOptimizer, DescribesAnySplit) {
  Context ctx;
  ParameterTable table(parse_model("gpt2"));
  const Optimizer optimizer(ctx, table, recipe_options("muon"));
  EXPECT_EQ(optimizer.owners().ranks(), 1);
  EXPECT_EQ(optimizer.owners().pieces().size(), table.rows().size());
  for (const int ranks : {1, 3, 8}) {
    const std::string text = optimizer.describe_ranks(ranks);
    EXPECT_EQ(std::ranges::count(text, '\n'), ranks + 2) << text;
  }
  EXPECT_NE(optimizer.describe_ranks(8).find("203.9"), std::string::npos);  // and Adam's 0.1
  const Assignment assignment = assign_rules(table, recipe_options("muon"));
  for (const int ranks : {1, 3, 8, 100}) {
    const auto infos = describe_ranks(assignment, owners_of(assignment, ranks));
    int64_t parameters = 0, bytes = 0, all_bytes = 0;
    for (const RankInfo& info : infos) parameters += info.parameters, bytes += info.state_bytes;
    EXPECT_EQ(parameters, table.size());
    for (const RowInfo& row : optimizer.describe(ranks)) all_bytes += row.state_bytes;
    EXPECT_EQ(bytes, all_bytes);
    EXPECT_EQ(bytes, 4 * (table.size() + 39'505'152));  // Muon's m; Adam's m and v of the others
  }
  const auto row = [&](const char* name, int ranks) {
    for (const RowInfo& info : optimizer.describe(ranks))
      if (info.parameter == name) return info.owners;
    return std::string();
  };
  EXPECT_EQ(row("wte.weight", 1), "0");
  EXPECT_EQ(row("wte.weight", 8), "0-7 by rows");
  EXPECT_EQ(row("h.0.mlp.c_proj.weight", 8), "4");
  EXPECT_EQ(row("h.1.attn.c_attn.weight", 8), "0-1");  // two of its three matrices belong to rank 0
}
