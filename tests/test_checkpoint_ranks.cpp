// Checkpoints that several ranks write, each what it owns, and that any number of ranks resumes.
#include <csignal>
#include <cstring>
#include <filesystem>
#include <set>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "error.h"
#include "model/checkpoint.h"
#include "tests/rank_files.h"

namespace fs = std::filesystem;
using Json = nlohmann::json;

namespace {

using CheckpointRanks = FilesByRanks;

const ModelConfig kConfig{.name = "test", .L = 2, .NH = 2, .C = 6, .positions = 5, .V = 11};

// Every parameter in matrices, embeddings in rows, given to ranks in turn.
std::vector<OwnedRows> owners_of(const ParameterTable& table, int ranks) {
  std::vector<OwnedRows> owned;
  int next = 0;
  for (size_t i = 0; i < table.rows().size(); ++i) {
    const Parameter& p = table.rows()[i];
    const int64_t pieces = p.role == Role::embedding ? ranks : p.matrices;
    for (int64_t k = 0; k < pieces; ++k) {
      const int64_t first = p.shape[0] * k / pieces, end = p.shape[0] * (k + 1) / pieces;
      owned.push_back({i, first, end - first, next++ % ranks});
    }
  }
  return owned;
}

/// A rank: its parameters and its optimizer's state, right where it owns them.
struct Rank {
  Context ctx;
  ParameterTable parameters{kConfig};
  Tensors state;
  std::vector<OwnedRows> owned;
  std::vector<NamedTensor> optimizer;  // pieces of `state`

  explicit Rank(Comm& comm) {
    use_cpu(ctx, 1);
    ctx.comm = std::shared_ptr<Comm>(&comm, [](Comm*) {});
    parameters.allocate(ctx, false);
    state.add("h.0.attn.c_attn.weight.m", DType::f32, {18, 6});
    state.add("wte.weight.v", DType::f64, {11});
    state.add("escape_velocity", DType::f32, {1});
    owned = owners_of(parameters, comm.size());
    optimizer = cut(state.list, 3, comm.rank(), comm.size());
  }

  // What training would leave: the truth in owned rows, anything elsewhere.
  void train(float step) {
    state.fill(static_cast<uint64_t>(step));
    for (size_t t = 0; t < state.list.size(); ++t) {
      std::vector<char> truth = state.memory[t];
      std::memset(state.memory[t].data(), 0x7f, truth.size());
      for (const NamedTensor& piece : optimizer) {
        if (!piece.value || piece.name != state.list[t].name) continue;
        const auto at = static_cast<size_t>(static_cast<char*>(piece.value.data) - state.memory[t].data());
        std::memcpy(piece.value.data, truth.data() + at, static_cast<size_t>(piece.value.bytes()));
      }
    }
    for (Parameter& p : parameters) std::ranges::fill(p.value.floats(), -99.0f);
    for (const OwnedRows& o : owned) {
      if (o.owner != ctx.comm->rank()) continue;
      const Tensor rows = parameters.rows()[o.parameter].value.slice(o.first, o.rows);
      for (int64_t i = 0; i < rows.size(); ++i) rows.f32()[i] = value_of(o, i, step);
    }
  }
  float value_of(const OwnedRows& o, int64_t i, float step) const {
    const int64_t cols = parameters.rows()[o.parameter].size() / parameters.rows()[o.parameter].shape[0];
    return 1000 * static_cast<float>(o.parameter) + static_cast<float>(o.first * cols + i) + step / 16;
  }

  std::string save(const std::string& out, int64_t step, int64_t keep = 0,
                   Existing existing = Existing::refuse) {
    train(static_cast<float>(step));
    const Json json = {{"step", step}};
    return save_checkpoint({.out = out,
                            .step = step,
                            .config = kConfig,
                            .parameters = parameters,
                            .owned = owned,
                            .optimizer = optimizer,
                            .state = json,
                            .tokenizer = "{}\n",
                            .keep = keep,
                            .existing = existing});
  }

  // Loads a checkpoint and looks at every value.
  void expect_loads(const std::string& folder, float step) {
    load_parameters(folder, parameters);
    for (const OwnedRows& o : owned) {
      const Tensor rows = parameters.rows()[o.parameter].value.slice(o.first, o.rows);
      for (int64_t i = 0; i < rows.size(); ++i) ASSERT_EQ(rows.f32()[i], value_of(o, i, step));
    }
    const Parameter& wte = parameters.at("wte.weight");
    const Tensor padded = wte.padded_value();
    ASSERT_GT(padded.size(), wte.size());
    for (int64_t i = wte.size(); i < padded.size(); ++i) ASSERT_EQ(padded.f32()[i], 0);
    train(step);
    const std::vector<std::vector<char>> right = state.memory;
    for (std::vector<char>& block : state.memory) std::memset(block.data(), 0x7f, block.size());
    load_optimizer(folder, optimizer);
    EXPECT_TRUE(state.memory == right);
  }
};

// The files of a folder, by name.
std::map<std::string, std::string> files_in(const TemporaryFolder& disk, const std::string& folder) {
  std::map<std::string, std::string> files;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder))
    files[entry.path().filename()] = disk.read(entry.path());
  return files;
}

TEST_F(CheckpointRanks, CheckpointsDoNotDependOnTheRanksAndAnyNumberResumes) {
  std::map<std::string, std::string> expected;
  const std::vector<int> numbers{1, 2, 3, 5};
  for (const int ranks : numbers) {
    const std::string out = path(fmt::format("run_{}", ranks));
    const auto said = run_ranks(ranks, [&](Comm& comm) {
      EXPECT_EQ(Rank(comm).save(out, 7), out + "/checkpoints/step-00000007");
      EXPECT_TRUE(fs::exists(out + "/checkpoints/step-00000007/state.json"));
    });
    EXPECT_EQ(said, well(ranks));
    const auto files = files_in(folder_, out + "/checkpoints/step-00000007");
    if (ranks == 1) expected = files;
    EXPECT_EQ(files.size(), 5U);
    EXPECT_TRUE(files == expected) << ranks;
    EXPECT_FALSE(fs::exists(out + "/checkpoints/step-00000007.tmp"));
  }
  for (size_t i = 0; i < numbers.size(); ++i) {
    const std::string folder =
        path(fmt::format("run_{}/checkpoints/step-00000007", numbers[(i + 1) % numbers.size()]));
    const auto said = run_ranks(numbers[i], [&](Comm& comm) { Rank(comm).expect_loads(folder, 7); });
    EXPECT_EQ(said, well(numbers[i]));
  }
}

TEST_F(CheckpointRanks, RanksThatNoListGivesAnythingLeaveAllToRank0) {
  const auto said = run_ranks(2, [&](Comm& comm) {
    Rank rank(comm);
    rank.train(1);
    float number = 0;
    for (Parameter& p : rank.parameters)
      for (float& value : p.value.floats()) value = comm.rank() == 0 ? ++number : -1;
    const Json json = Json::object();
    save_checkpoint({.out = path("run"),
                     .step = 1,
                     .config = kConfig,
                     .parameters = rank.parameters,
                     .optimizer = rank.optimizer,
                     .state = json});
  });
  EXPECT_EQ(said, well(2));
  Comm alone;
  Rank loaded(alone);
  load_parameters(path("run/checkpoints/step-00000001"), loaded.parameters);
  float number = 0;
  for (const Parameter& p : loaded.parameters)
    for (const float value : p.value.floats()) ASSERT_EQ(value, ++number) << p.name;
}

TEST_F(CheckpointRanks, AParameterThatNobodyOwnsIsAnErrorOnAllRanks) {
  for (const bool whole : {true, false}) {
    const auto said = run_ranks(2, [&](Comm& comm) {
      Rank rank(comm);
      if (whole)
        rank.owned.pop_back();
      else
        rank.owned.erase(rank.owned.begin() + 1);  // the second half of the embedding
      rank.save(path("run"), 1);
    });
    expect_same(said, {"rank 0: ", whole ? "has no owner" : "in no piece"}, path("run/checkpoints"));
  }
}

TEST_F(CheckpointRanks, WhateverFailsTheLastCheckpointIsIntact) {
  const std::string run = path("run"), last = run + "/checkpoints/step-00000001";
  fs::create_directories(path("other/checkpoints"));
  ASSERT_EQ(run_ranks(3, [&](Comm& comm) { Rank(comm).save(run, 1); }), well(3));
  const auto before = files_in(folder_, last);
  const auto expect_intact = [&](const std::vector<std::string>& said,
                                 std::initializer_list<std::string> parts) {
    expect_same(said, parts, run + "/checkpoints", {"step-00000001"});
    EXPECT_TRUE(files_in(folder_, last) == before);
    EXPECT_EQ(newest_checkpoint(run), last);
  };
  // A rank that cannot write.
  for (int failing = 0; failing < 3; ++failing)
    expect_intact(run_ranks(
                      3,
                      [&](Comm& comm) {
                        Rank rank(comm);
                        if (comm.rank() == failing) limit_files(1000);
                        rank.save(run, 2, 1);
                      },
                      RanksAre::processes),
                  {fmt::format("rank {}: cannot write (File too large)", failing), "step-00000002.tmp"});
  // One with another optimizer: the model's file is there already.
  expect_intact(run_ranks(3,
                          [&](Comm& comm) {
                            Rank rank(comm);
                            if (comm.rank() == 1) rank.optimizer.back().name = "another";
                            try {
                              rank.save(run, 2, 1);
                            } catch (const RunError&) {  // what failed is gone before anyone goes on
                              EXPECT_FALSE(fs::exists(run + "/checkpoints/step-00000002.tmp"));
                              throw;
                            }
                          }),
                {"rank 1: the tensors are not those of rank 0", "optimizer.safetensors"});
  // A rank that sees another folder.
  for (const char* elsewhere : {"other", "gone"})
    expect_intact(
        run_ranks(3, [&](Comm& comm) { Rank(comm).save(comm.rank() == 2 ? path(elsewhere) : run, 2, 1); }),
        {"rank 2: ", "does not see", "No such file", path(elsewhere), "share"});
  // A step that was saved, and another process that writes there.
  expect_intact(run_ranks(3, [&](Comm& comm) { Rank(comm).save(run, 1); }),
                {"rank 0: a checkpoint of this step exists", last});
  const FolderLock lock(run + "/checkpoints");
  fs::create_directory(run + "/checkpoints/step-00000002.tmp");  // its own, and not to be touched
  expect_same(run_ranks(3, [&](Comm& comm) { Rank(comm).save(run, 2); }), {"rank 0: another process"},
              run + "/checkpoints", {"step-00000001", "step-00000002.tmp"});
}

TEST_F(CheckpointRanks, AFullDiskKeepsTheCheckpointsThatFit) {
  const TinyDisk tiny(path("disk"), "200k");
  if (!tiny.mounted()) GTEST_SKIP() << "cannot mount a small disk here (needs root)";
  int64_t step = 0;
  std::vector<std::string> said = well(3);
  while (said == well(3))
    said = run_ranks(3, [&](Comm& comm) { Rank(comm).save(path("disk"), step + 1); }), ++step;
  ASSERT_GT(step, 2);
  std::set<std::string> kept;
  for (int64_t k = 1; k < step; ++k) kept.insert(fmt::format("step-{:08}", k));
  expect_same(said, {"rank 0: ", "No space left", "free some space"}, path("disk/checkpoints"), kept);
  const std::string last = path(fmt::format("disk/checkpoints/step-{:08}", step - 1));
  EXPECT_EQ(run_ranks(2,
                      [&](Comm& comm) {
                        EXPECT_EQ(newest_checkpoint(comm, path("disk")), last);
                        Rank(comm).expect_loads(last, static_cast<float>(step - 1));
                      }),
            well(2));
}

/// A rank that does something else instead of coming to a meeting.
class LeavingComm : public Comm {
 public:
  LeavingComm(Comm& inner, int meetings, std::function<void()> leave)
      : Comm(inner.rank(), inner.size()), inner_(inner), left_(meetings), leave_(std::move(leave)) {}
  void sum(std::span<double> values) override {
    if (left_-- == 0) leave_();
    inner_.sum(values);
  }

 private:
  Comm& inner_;
  int left_;
  std::function<void()> leave_;
};

class LeavingRank : public FilesByRanks, public ::testing::WithParamInterface<std::tuple<RanksAre, int>> {};

TEST_P(LeavingRank, DoesNoHarmAtAnyMoment) {
  const RanksAre are = std::get<0>(GetParam());
  const int leaver = std::get<1>(GetParam());
  const std::string out = path("run"), first = out + "/checkpoints/step-00000001";
  ASSERT_EQ(run_ranks(3, [&](Comm& comm) { Rank(comm).save(out, 1); }), well(3));
  const auto before = files_in(folder_, first);
  // A process is killed; a thread throws, and then the others clean up.
  const auto leave = [killed = are == RanksAre::processes] {
    if (killed) ::raise(SIGKILL);
    throw std::logic_error("gone");
  };
  int meetings = 0;
  for (std::vector<std::string> said; said != well(3); ++meetings) {
    const auto save = [&](Comm& inner) {
      LeavingComm comm(inner, inner.rank() == leaver ? meetings : 1 << 30, leave);
      Rank(comm).save(out, 2, 0, Existing::replace);
    };
    said = run_ranks(3, save, are);
    // The new one is complete or not there at all, and the old one as it was.
    std::vector<std::string> passed_over;
    const auto newest = newest_checkpoint(out, &passed_over);
    ASSERT_TRUE(newest);
    EXPECT_TRUE(passed_over.empty());
    EXPECT_TRUE(files_in(folder_, first) == before);
    Comm alone;
    Rank(alone).expect_loads(*newest, static_cast<float>(checkpoint_step(*newest)));
    for (const fs::directory_entry& entry : fs::directory_iterator(out + "/checkpoints"))
      if (are == RanksAre::threads || leaver != 0) {
        EXPECT_FALSE(entry.path().string().ends_with(".tmp")) << entry.path() << " " << meetings;
      }
    fs::remove_all(out + "/checkpoints/step-00000002");
  }
  EXPECT_GT(meetings, 10);
  // What rank 0 left in the last time is no obstacle.
  EXPECT_EQ(run_ranks(2, [&](Comm& comm) { Rank(comm).save(out, 2); }), well(2));
  expect_same(well(1), {}, out + "/checkpoints", {"step-00000001", "step-00000002"});
}

INSTANTIATE_TEST_SUITE_P(Each, LeavingRank,
                         ::testing::Combine(::testing::Values(RanksAre::threads, RanksAre::processes),
                                            ::testing::Values(0, 2)));

TEST_F(CheckpointRanks, OldOnesGoWhenTheNewOneIsThere) {
  for (int64_t step = 1; step <= 4; ++step) {
    const auto said = run_ranks(2, [&](Comm& comm) { Rank(comm).save(path("run"), step, 2); });
    EXPECT_EQ(said, well(2));
  }
  expect_same(run_ranks(2, [&](Comm& comm) { Rank(comm).save(path("run"), 4, 2, Existing::replace); }), {},
              path("run/checkpoints"), {"step-00000003", "step-00000004"});
}

TEST_F(CheckpointRanks, Rank0LooksForTheNewestCheckpointAndAllKnowIt) {
  const std::string first = path("run/checkpoints/step-00000001");
  const auto newest = [&](const std::function<std::string(int)>& out_of,
                          const std::optional<std::string>& expected, size_t damaged) {
    return run_ranks(3, [&](Comm& comm) {
      std::vector<std::string> passed_over;
      EXPECT_EQ(newest_checkpoint(comm, out_of(comm.rank()), &passed_over), expected);
      EXPECT_EQ(passed_over.size(), comm.rank() == 0 ? damaged : 0);
    });
  };
  const auto run = [&](int) { return path("run"); };
  EXPECT_EQ(newest(run, std::nullopt, 0), well(3));
  ASSERT_EQ(run_ranks(2,
                      [&](Comm& comm) {
                        Rank(comm).save(path("run"), 1);
                        Rank(comm).save(path("run"), 2);
                      }),
            well(2));
  EXPECT_EQ(newest(run, path("run/checkpoints/step-00000002"), 0), well(3));
  folder_.write("run/checkpoints/step-00000002/model.safetensors", "damage");
  EXPECT_EQ(newest(run, first, 1), well(3));
  // Rank 0's word counts, wherever the others would look.
  EXPECT_EQ(newest([&](int rank) { return path(rank == 0 ? "run" : "gone"); }, first, 1), well(3));
}

TEST_F(CheckpointRanks, FoldersThatAreNotSharedAreNoticedAtTheStart) {
  fs::create_directories(path("a"));
  fs::create_directories(path("b"));
  for (const int ranks : {1, 3})
    expect_same(run_ranks(ranks, [&](Comm& comm) { expect_shared(comm, path("a")); }), {}, path("a"));
  const auto said =
      run_ranks(3, [&](Comm& comm) { expect_shared(comm, path(comm.rank() == 1 ? "b" : "a")); });
  expect_same(said, {"rank 1: ", "does not see", path("b")}, path("a"));
  expect_same(run_ranks(3, [&](Comm& comm) { expect_shared(comm, path("gone")); }),
              {"rank 0: cannot write", path("gone")}, path("b"));
}

}  // namespace
