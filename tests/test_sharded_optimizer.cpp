// The optimizer on several ranks: each keeps and moves what it owns, and together they make the steps of one.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "optim/telemetry.h"
#include "tests/sharded_fixture.h"

// Without clipping or measuring nothing is summed over ranks but what is reported: entry by entry and row by
// row (rows of 16 fill vector registers) the arithmetic is the same, to the bit. Products of batches may be
// cut up otherwise, and prodigy's velocity is a sum over ranks: a few roundings of 6e-8 a step, which bases
// and roots can make larger, so 1e-5.
TEST(ShardedOptimizer, EveryRuleIsThatOfOneProcess) {
  for (const RuleEntry& entry : rule_table()) {
    const std::unique_ptr<Rule> rule = make_rule("--hidden", entry.name);
    const std::string name = entry.name;
    const bool products = rule->work({.shape = {16, 16}, .blocks = {}}) > 100 * 256;
    const std::string vectors = rule->matrices_only() ? "sign" : name;
    check_ranks(everywhere(name, vectors), products || rule->escapes() ? 1e-5 : 0);
  }
}

TEST(ShardedOptimizer, EveryRecipeIsThatOfOneProcess) {
  for (const Recipe& recipe : recipe_table()) check_ranks(recipe_options(recipe.name), 1e-5);
}

TEST(ShardedOptimizer, OverridesSensitivitiesAndHyperball) {
  OptimizerOptions options = recipe_options("modular");
  options.overrides = {{"h.*.mlp.c_fc.weight", "muon:lr=0.04,s=2"},
                       {"h.1.attn.c_attn.weight", "adam:hyperball=1,lr=0.02"},
                       {"wte.weight", "sgd:momentum=0.9,nesterov=1"},
                       {"wpe.weight", "colnorm:hyperball=1"},
                       {"ln_f.*", "lion"}};
  options.sensitivities = {"h.0.*=2", "wte.weight=0.5"};
  check_ranks(options, 1e-5);
  options = everywhere("adam:wd=0.1,cautious=1", "adam");
  options.overrides = {{"h.*", "adam:lr=0.03,s=3"}};
  check_ranks(options, 0);
}

// The norm is a sum by pieces in float64, so the clip factor is the same to one rounding of float32.
TEST(ShardedOptimizer, ClipsByTheNormOfAll) {
  for (const char* rule : {"adam:eps=1e-3", "sgd:lr=0.1", "muon"}) {
    OptimizerOptions options = everywhere(rule, rule == std::string("muon") ? "adam" : rule);
    options.grad_clip = 0.05;
    check_ranks(options, 1e-5);
  }
}

namespace {
/// Rules that remember nothing, of several norms.
OptimizerOptions without_memory() {
  OptimizerOptions options = everywhere("spectral:ns=svd,scale=rms", "sign");
  options.rules[Role::embedding] = "colnorm:s=3";
  options.rules[Role::position] = "sgd";
  options.overrides = {{"h.1.mlp.c_fc.weight", "scion:alpha=1,radius=2"},
                       {"h.0.mlp.c_proj.weight", "adam:beta1=0,beta2=0,eps=0"}};
  return options;
}
}  // namespace

// Step sizes are sums over all tensors.
TEST(ShardedOptimizer, MeasuredSteps) {
  OptimizerOptions options = everywhere("rownorm:momentum=0.5,nesterov=1", "sign");
  options.rules[Role::embedding] = "colnorm:s=3";
  options.rules[Role::position] = "sgd";
  options.sharpness = 10;
  check_ranks(options, 1e-5);
  options.grad_clip = 0.1;
  check_ranks(options, 1e-5);
  OptimizerOptions no_memory = without_memory();
  no_memory.grad_clip = 0.1, no_memory.sharpness = 10;
  check_ranks(no_memory, 1e-5);
  options.sharpness = 0;
  options.escape = parse_escape("--escape", "1e-3:growth=2");
  check_ranks(options, 1e-5);
  options = everywhere("spectral:ns=svd,scale=rms", "adam");
  options.rules[Role::embedding] = "adam";
  options.escape = parse_escape("--escape", "1e-3");
  check_ranks(options, 1e-5);
  for (const char* variant : {"no-ema", "package", "paper"}) {
    const std::string rule = std::string("prodigy:eta0=1e-3,variant=") + variant;
    options = everywhere(rule, rule);
    check_ranks(options, 1e-5);
    options.grad_clip = 0.1;
    check_ranks(options, 1e-5);
  }
}

// Squares of gradients and what steps are measured by go together, but where agreement.h says why not.
TEST(ShardedOptimizer, RanksAgreeInOneExchange) {
  const auto expect_sums = [](const OptimizerOptions& options, int64_t want) {
    SCOPED_TRACE(options.rules.at(Role::hidden));
    const auto failures = on_ranks(3, [&](const std::shared_ptr<Comm>& comm) {
      RankModel model(options, comm);
      const auto& counted = dynamic_cast<const ThreadComm&>(*comm);
      for (int64_t t = 0; t < 3; ++t) {
        model.set_gradients(t);
        const int64_t before = counted.sums();
        model.optimizer.step(t, 20);
        EXPECT_EQ(counted.sums() - before, want) << "step " << t;
      }
    });
    for (const std::string& failure : failures) EXPECT_EQ(failure, "");
  };
  const auto clipped = [](OptimizerOptions options) {
    options.grad_clip = 0.1;
    return options;
  };
  expect_sums(recipe_options("muon"), 1);
  expect_sums(recipe_options("adamw"), 1);
  OptimizerOptions memory = everywhere("muon:steps=1", "signum"), bare = without_memory();
  memory.sharpness = bare.sharpness = 10;
  expect_sums(memory, 1);
  expect_sums(bare, 1);
  expect_sums(clipped(bare), 1);
  expect_sums(clipped(memory), 2);
  bare.rules[Role::vector] = "adam:beta1=0,beta2=0";  // eps makes small gradients others than large ones
  expect_sums(clipped(bare), 2);
  memory.sharpness = 0, memory.escape = parse_escape("--escape", "1e-3");
  expect_sums(memory, 1);
  expect_sums(clipped(memory), 1);
  expect_sums(recipe_options("prodigy"), 1);
  expect_sums(clipped(recipe_options("prodigy")), 1);
  expect_sums(everywhere("prodigy:variant=no-ema", "prodigy:variant=no-ema"), 1);
  expect_sums(everywhere("prodigy:variant=package", "prodigy:variant=package"), 2);
  expect_sums(everywhere("prodigy:variant=package,eps=0", "prodigy:variant=package,eps=0"), 1);
}

// A number that is not finite, in any piece, seen by its owner alone: no rank moves, all say the same.
TEST(ShardedOptimizer, NonFiniteGradientStopsAllRanks) {
  std::vector<OptimizerOptions> list = {recipe_options("muon"), recipe_options("adamw"),
                                        recipe_options("prodigy"), everywhere("rownorm", "sign")};
  list.back().sharpness = 10;
  list.push_back(everywhere("normuon:steps=1", "signum"));
  list.back().sharpness = 10;
  list.push_back(everywhere("soap", "adam"));
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

// Telemetry looks at whole tensors: whoever has several ranks gathers gradients before a measured step, and
// directions in it, and gathers what telemetry asks for.
TEST(ShardedOptimizer, TelemetryMeasuresTheWholeStep) {
  const OptimizerOptions options = recipe_options("modular");
  const auto measure = [&](const std::shared_ptr<Comm>& comm) {
    RankModel model(options, comm);
    Telemetry telemetry(model.ctx, model.table, model.optimizer, 1);
    telemetry.allocate();
    model.step(0);
    int64_t batch = 1;
    return telemetry.measure(
        {.t = 1,
         .gradients =
             [&] {
               model.set_gradients(batch++);
               return 1.0;
             },
         .update =
             [&] {
               model.optimizer.step(1, 20, /*keep_directions=*/true);
               model.gather(&Parameter::grad);
             },
         .gather =
             [&](std::span<const Tensor> whole) {
               std::vector<Part> parts;
               for (const Piece& piece : model.optimizer.owners().pieces())
                 parts.push_back({model.rows(whole[piece.parameter], piece), piece.owner});
               comm->finish(comm->start_all_gather(parts));
             }});
  };
  const StepNorms want = measure(std::make_shared<Comm>());
  for (const int ranks : {2, 5}) {
    const auto failures = on_ranks(ranks, [&](const std::shared_ptr<Comm>& comm) {
      const StepNorms got = measure(comm);
      EXPECT_NEAR(got.predicted / want.predicted, 1, 1e-5);
      EXPECT_NEAR(got.length / want.length, 1, 1e-5);
      EXPECT_NEAR(got.sharpness / want.sharpness, 1, 1e-4);
      ASSERT_EQ(got.tensors.size(), want.tensors.size());
      for (size_t i = 0; i < got.tensors.size(); ++i) {
        const TensorNorms &a = got.tensors[i], &b = want.tensors[i];
        EXPECT_NEAR(a.gradient_dual / b.gradient_dual, 1, 1e-5) << a.name;
        EXPECT_NEAR(a.alignment / b.alignment, 1, 1e-5) << a.name;
        EXPECT_NEAR(a.s_step / b.s_step, 1, 1e-5) << a.name;
      }
    });
    for (const std::string& failure : failures) EXPECT_EQ(failure, "");
  }
}
