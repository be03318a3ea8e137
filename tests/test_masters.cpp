// Where the float32 values of parameters lie: in banks of one shape, and where products read bf16 copies each
// at the one rank that owns it. On the CPU, whose optimizer moves such copies as a GPU does.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <set>

#include "tests/optim_fixture.h"
#include "tests/rank_threads.h"

namespace {
void in_bf16(Context& ctx) {
  use_cpu(ctx, 1);
  ctx.dtype = DType::bf16;
}

struct HalfModel : SmallModel {
  HalfModel(const OptimizerOptions& options, const std::shared_ptr<Comm>& comm = std::make_shared<Comm>())
      : SmallModel(options, in_bf16, 16, comm) {}
};

OptimizerOptions adam_everywhere() {
  return everywhere("adam:wd=0.1,lr=0.01", "adam");
}

/// Runs on every rank; no rank may fail.
void on_all(int ranks, const std::function<void(const std::shared_ptr<Comm>&)>& body) {
  SCOPED_TRACE(std::to_string(ranks) + " ranks");
  for (const std::string& failure : on_ranks(ranks, body)) EXPECT_EQ(failure, "");
}

std::vector<float> master_values(const Parameter& p) {
  std::vector<float> all;
  for (const MasterRows& m : p.masters)
    all.insert(all.end(), m.values.floats().begin(), m.values.floats().end());
  return all;
}

/// The float32 values of a rank's rows are those of `whole`, and its copy is rounded from all of them.
void expect_rows_of(const Parameter& p, const Parameter& whole) {
  ASSERT_TRUE(whole.value);
  const int64_t cols = p.shape.cols();
  for (const MasterRows& m : p.masters) {
    const std::span<const float> got = m.values.floats();
    EXPECT_TRUE(std::equal(got.begin(), got.end(), whole.value.f32() + m.first * cols)) << p.name;
  }
  for (int64_t i = 0; i < p.size(); ++i)
    ASSERT_EQ(to_float(p.compute.bf16()[i]), to_float(to_bf16(whole.value.f32()[i]))) << p.name << " " << i;
}

TEST(Masters, LieAtTheirOwnersAlone) {
  const HalfModel single(adam_everywhere());
  for (const Parameter& p : single.table) ASSERT_EQ(p.masters.size(), 1U);
  int64_t vectors = 0;
  for (const Parameter& p : single.table) vectors += p.is_matrix() ? 0 : 4 * p.size();
  for (const int ranks : {1, 2, 3, 8})
    on_all(ranks, [&](const std::shared_ptr<Comm>& comm) {
      HalfModel model(adam_everywhere(), comm);
      double bytes = static_cast<double>(model.table.master_bytes(model.ctx) - vectors);
      std::vector<double> held(model.table.rows().size());
      for (size_t i = 0; i < held.size(); ++i) {
        const Parameter& p = model.table.rows()[i];
        EXPECT_EQ(static_cast<bool>(p.value), ranks == 1 || !p.is_matrix()) << p.name;
        for (const MasterRows& m : p.masters) held[i] += static_cast<double>(m.values.shape[0]);
        expect_rows_of(p, single.table.rows()[i]);
      }
      comm->sum({&bytes, 1});
      comm->sum(held);
      int64_t all = 0;
      for (size_t i = 0; i < held.size(); ++i) {
        const Parameter& p = model.table.rows()[i];
        if (p.is_matrix()) all += 4 * (ranks == 1 ? p.padded_rows : p.shape[0]) * p.shape[1];
        EXPECT_EQ(held[i], p.shape[0] * (p.is_matrix() ? 1 : ranks)) << p.name << ": every row once";
      }
      EXPECT_EQ(bytes, all);
    });
}

TEST(Masters, StepsMoveThoseOfOneProcess) {
  HalfModel single(adam_everywhere());
  for (int64_t t = 0; t < 3; ++t) single.step(t);
  for (const int ranks : {2, 3})
    on_all(ranks, [&](const std::shared_ptr<Comm>& comm) {
      HalfModel model(adam_everywhere(), comm);
      const auto before = master_values(model.table.at("h.1.mlp.c_fc.weight"));
      for (int64_t t = 0; t < 3; ++t) model.step(t);
      for (const Piece& piece : model.optimizer.owners().pieces()) {
        if (piece.owner != comm->rank()) continue;
        const Parameter &p = model.table.rows()[piece.parameter],
                        &whole = single.table.rows()[piece.parameter];
        const Tensor own = p.master(piece.first, piece.rows), copy = p.compute.slice(piece.first, piece.rows),
                     want = whole.value.slice(piece.first, piece.rows);
        EXPECT_EQ(std::memcmp(own.data, want.data, static_cast<size_t>(own.bytes())), 0) << p.name;
        for (int64_t i = 0; i < own.size(); ++i)
          ASSERT_EQ(to_float(copy.bf16()[i]), to_float(to_bf16(own.f32()[i]))) << p.name;
      }
      EXPECT_EQ(before.empty(), master_values(model.table.at("h.1.mlp.c_fc.weight")) == before) << "it moves";
    });
}

TEST(Masters, OthersRowsAreRefused) {
  on_all(2, [&](const std::shared_ptr<Comm>& comm) {
    const HalfModel model(adam_everywhere(), comm);
    const Parameter& wte = model.table.at("wte.weight");
    ASSERT_EQ(wte.masters.size(), 1U);
    const MasterRows& own = wte.masters[0];
    EXPECT_EQ(wte.master(own.first + 1, 2).data, own.values.f32() + 16);
    EXPECT_THROW(wte.master(0, wte.shape[0]), std::logic_error);
    EXPECT_THROW(wte.master(own.first > 0 ? 0 : wte.shape[0] - 1, 1), std::logic_error);
  });
}

/// Where the matrices of one shape begin, in the order of their addresses.
std::map<std::pair<int64_t, int64_t>, std::vector<const char*>> banks(const ParameterTable& table,
                                                                      Tensor Parameter::*tensor) {
  std::map<std::pair<int64_t, int64_t>, std::vector<const char*>> found;
  for (const Parameter& p : table) {
    if (p.role != Role::hidden) continue;
    const Tensor& all = p.*tensor;
    for (int i = 0; i < p.matrices; ++i) {
      const Tensor block = all.slice(i * p.shape[0] / p.matrices, p.shape[0] / p.matrices);
      found[{block.shape[0], block.shape[1]}].push_back(static_cast<const char*>(block.data));
    }
  }
  for (auto& [shape, starts] : found) std::ranges::sort(starts);
  return found;
}

TEST(Banks, HiddenMatricesOfOneShapeLieTogether) {
  const HalfModel model(recipe_options("muon"));
  for (Tensor Parameter::*tensor : {&Parameter::value, &Parameter::grad, &Parameter::compute}) {
    const auto found = banks(model.table, tensor);
    EXPECT_EQ(found.size(), 3U);  // (C, C), (4C, C), (C, 4C)
    for (const auto& [shape, starts] : found) {
      EXPECT_EQ(starts.size(), shape.first == shape.second ? 8U : 2U);  // of 2 layers
      const DType dtype = tensor == &Parameter::compute ? DType::bf16 : DType::f32;
      for (size_t i = 1; i < starts.size(); ++i)
        EXPECT_EQ(starts[i] - starts[i - 1], dtype_bytes(dtype) * shape.first * shape.second);
    }
  }
}

// What a step of Adam reads side by side lies at different places of a page: see Arena.
TEST(Banks, OfOneStepBeginApart) {
  Context ctx;
  use_cpu(ctx, 1);
  ParameterTable table(parse_model("gpt2-nano:channels=256,heads=4"));
  Optimizer optimizer(ctx, table, adam_everywhere());
  table.allocate(ctx, /*with_gradients=*/true);
  optimizer.allocate();
  const auto place = [](const Tensor& x) {
    return reinterpret_cast<uintptr_t>(x.data) / kAlign % Arena::kPlaces;
  };
  int matrices = 0;
  for (const Parameter& p : table) {
    if (p.role != Role::hidden) continue;
    std::set<size_t> places = {place(p.value), place(p.grad)};
    for (const NamedTensor& state : optimizer.state())
      if (state.name.starts_with(p.name + ".")) places.insert(place(state.value));
    EXPECT_EQ(places.size(), 4U) << p.name;  // w, g, m, v
    ++matrices;
  }
  EXPECT_EQ(matrices, 12);
}

TEST(Banks, SoDoesTheirState) {
  HalfModel model(recipe_options("muon"));
  std::map<std::pair<int64_t, int64_t>, std::vector<const char*>> starts;
  for (const NamedTensor& tensor : model.optimizer.state()) {
    const Parameter& p = model.table.at(tensor.name.substr(0, tensor.name.rfind('.')));
    if (p.role != Role::hidden) continue;
    for (int i = 0; i < p.matrices; ++i) {
      const int64_t rows = p.shape[0] / p.matrices;
      starts[{rows, p.shape[1]}].push_back(static_cast<const char*>(tensor.value.slice(i * rows, rows).data));
    }
  }
  EXPECT_EQ(starts.size(), 3U);
  for (auto& [shape, list] : starts) {
    std::ranges::sort(list);
    for (size_t i = 1; i < list.size(); ++i) EXPECT_EQ(list[i] - list[i - 1], 4 * shape.first * shape.second);
  }
}
}  // namespace
