// What each rank owns and keeps: pieces of state that make up the same files, on every device.
#include <gtest/gtest.h>

#include "model/config.h"
#include "tests/sharded_fixture.h"

namespace {
/// A rank whose others are elsewhere: nothing is exchanged.
struct OneOf final : Comm {
  OneOf(int rank, int size) : Comm(rank, size) {}
};
}  // namespace

TEST(ShardedState, EmbeddingsAreCutWhereTheirRuleAllows) {
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

TEST(ShardedState, StateIsKeptByItsOwnerAlone) {
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
TEST(ShardedState, ContinuesOnAnotherNumberOfRanks) {
  for (const char* rule : {"adam", "muon", "normuon", "dion", "shampoo:freq=2", "soap:freq=2",
                           "muon:hyperball=1", "prodigy:eta0=1e-3"}) {
    SCOPED_TRACE(rule);
    OptimizerOptions options = everywhere("adam", "adam");
    options.rules[Role::hidden] = rule;
    if (make_rule("--hidden", rule)->escapes()) options = everywhere(rule, rule);
    const Trace want = alone(options, 6), early = alone(options, 3);
    for (const auto& [before, after] : {std::pair{1, 3}, {3, 2}, {8, 1}, {2, 8}}) {
      const Trace first = together(options, before, 3)[0];
      expect_same(first, early, 1e-5);
      const auto failures =
          on_ranks(after, [&, before = before, after = after](const std::shared_ptr<Comm>& comm) {
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

// One rank of three at a time, on every device: without clipping it needs nothing of the others. Pieces of
// rows begin where they may, and the bf16 copies of what a rank owns move with it.
TEST(ShardedState, EachDeviceMovesWhatItsRankOwns) {
  std::vector<UseDevice> devices = both_devices();
  if (kHaveGpu) devices.push_back([](Context& ctx) { use_gpu(ctx, 0, DType::bf16); });
  OptimizerOptions modular = recipe_options("modular");
  modular.rules[Role::hidden] = "muon:steps=1";  // the executor takes its time for products
  for (const UseDevice use : devices)
    for (const OptimizerOptions& options : {modular, everywhere("adam", "adam")}) {
      SCOPED_TRACE(options.rules.at(Role::hidden));
      SmallModel single(options, use, 12);
      const auto start = single.weights();
      for (int64_t t = 0; t < 2; ++t) single.step(t);
      for (int rank = 0; rank < 3; ++rank) {
        SmallModel model(options, use, 12, std::make_shared<OneOf>(rank, 3));
        for (int64_t t = 0; t < 2; ++t) model.step(t);
        size_t row = 0;
        const float* before = start.data();
        for (const Parameter& p : model.table) {
          for (const Piece& piece : model.optimizer.owners().pieces_of(row)) {
            const auto values = [&](SmallModel& of, Tensor Parameter::*tensor) {
              return download(of.ctx, (of.table.rows()[row].*tensor).slice(piece.first, piece.rows)).data;
            };
            const auto rounded = [&](std::vector<float> list) {
              if (p.compute.dtype == DType::bf16)
                for (float& x : list) x = to_float(to_bf16(x));
              return list;
            };
            const std::vector<float> copy = values(model, &Parameter::compute);
            if (piece.owner == rank) {
              const Matrix got = download(model.ctx, p.master(piece.first, piece.rows));
              const Tensor whole = single.table.rows()[row].value.slice(piece.first, piece.rows);
              EXPECT_LT(deviation(got, download(single.ctx, whole)), 1e-6) << p.name;
              EXPECT_EQ(copy, rounded(got.data)) << p.name;
            } else {
              const float* first = before + piece.first * (p.size() / p.shape[0]);
              const std::vector<float> old(first, first + copy.size());
              EXPECT_EQ(copy, rounded(old)) << p.name;
              if (p.value) {
                EXPECT_EQ(values(model, &Parameter::value), old) << p.name;
              }
              EXPECT_EQ(static_cast<bool>(p.value), !p.is_matrix() || p.compute.dtype == DType::f32);
            }
          }
          before += p.size();
          ++row;
        }
      }
    }
}

TEST(ShardedState, IsNoGraphWhereExchangesWait) {
  EXPECT_TRUE(RankModel(recipe_options("adamw"), std::make_shared<Comm>()).optimizer.capturable());
  on_ranks(1, [](const std::shared_ptr<Comm>& comm) {
    EXPECT_FALSE(RankModel(recipe_options("adamw"), comm).optimizer.capturable());
  });
}

// With the copy of the state that a sharpness lays aside, where it does.
TEST(ShardedState, APlanForRanksIsWhatARankTakes) {
  const auto taken = [](const OptimizerOptions& options) {
    int64_t most = 0, planned = 0;
    for (int rank = -1; rank < 4; ++rank) {  // first one process that asks
      Context ctx;
      if (rank >= 0) ctx.comm = std::make_shared<OneOf>(rank, 4);
      ParameterTable table(parse_model("gpt2"));  // nothing is allocated
      const Optimizer optimizer(ctx, table, options);
      const RankInfo info = optimizer.most_of_a_rank(4);
      if (rank < 0) planned = info.state_bytes + info.aside_bytes;
      if (rank >= 0) most = std::max(most, optimizer.state_bytes());
    }
    EXPECT_NEAR(static_cast<double>(planned) / static_cast<double>(most), 1, 1e-3);
    return static_cast<double>(most);
  };
  OptimizerOptions options = everywhere("adam", "adam");
  const double state = taken(options);
  options.sharpness = 10;
  EXPECT_NEAR(taken(options) / state, 2, 1e-3);
  options.grad_clip = 1;
  EXPECT_NEAR(taken(options) / state, 1, 1e-3);
}

TEST(ShardedState, DescribesAnySplit) {
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
