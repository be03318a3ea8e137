// The program as a job of several processes under mpirun, from the outside.
#include <fmt/format.h>

#include "random.h"
#include "tests/program_ranks_fixture.h"

namespace {
class ProgramRanksOnGpu : public ProgramRanks {
 protected:
  ProgramRanksOnGpu() : ProgramRanks({"TRAIN_GPT_GPU", "cuda"}) {}
};
}  // namespace

// A step size at which rounding is not amplified: at the recipe's own, one process differs from itself with
// another --batch-size by 1e-5 after 100 steps.
TEST_F(ProgramRanks, AnyNumberGivesTheLossesOfOneOver100Steps) {
  prepare();
  const Words more = {"--steps",      "100", "--val-every", "50",
                      "--batch-size", "1",   "--hidden",    "muon:lr=0.002"};
  expect_success(run(job("one", more)));
  for (const int N : {2, 3, 4, 8}) {
    const std::string out = "ranks" + std::to_string(N);
    expect_success(run(job(out, more), ranks(N)));
    expect_same_losses("one", out, 1e-6);
  }
}

TEST_F(ProgramRanks, RerunsHaveTheSameBits) {
  prepare();
  for (const char* out : {"first", "second"}) expect_success(run(job(out), ranks(3)));
  EXPECT_EQ(losses("first"), losses("second"));
  expect_same_checkpoint("first", "second", "step-00000006");
}

// As torchrun starts them: such ranks meet over NCCL, for which there is no GPU here, or nothing was built.
TEST_F(ProgramRanks, RanksThatMpiDidNotStartAreSentToIt) {
  prepare();
  const Result result =
      run(job("none"), {"env", "CUDA_VISIBLE_DEVICES=", "RANK=0", "WORLD_SIZE=2", "MASTER_ADDR=127.0.0.1"});
  EXPECT_EQ(result.status, 2);
  EXPECT_NE(result.err.find(" over MPI"), std::string::npos) << result.err;
  EXPECT_NE(result.err.find(", WORLD_SIZE=2, start them with mpirun -np N"), std::string::npos) << result.err;
  EXPECT_FALSE(fs::exists(path("none")));
}

TEST_F(ProgramRanks, MicroBatchesAndRanksAreInterchangeable) {
  prepare();
  const auto split = [&](const std::string& out, int N, const char* rows) {  // N x micro-batches x rows
    expect_success(run(job(out, {"--batch-size", rows}), ranks(N)));
  };
  split("4x6x1", 4, "6");
  split("4x2x3", 4, "2");
  split("2x1x12", 2, "1");
  expect_same_losses("4x6x1", "4x2x3", 1e-6);
  expect_same_losses("4x6x1", "2x1x12", 1e-6);
}

TEST_F(ProgramRanks, ResumesOnAnotherNumber) {
  prepare();
  const Words escape = {"--escape", "1e-3"};  // its last numbers are those of all ranks in the checkpoint
  expect_success(run(job("whole")));
  expect_success(run(job("whole-escape", escape)));
  for (const auto& [before, after, more] :
       {std::tuple(1, 3, Words()), {4, 1, Words()}, {3, 8, Words()}, {3, 2, escape}}) {
    const std::string whole = more.empty() ? "whole" : "whole-escape";
    const std::string out = fmt::format("{}-from{}to{}", whole, before, after);
    Words words = more;
    words.insert(words.end(), {"--checkpoint-every", "3"});
    expect_success(run(job(out, words), ranks(before)));
    fs::remove_all(path(out + "/checkpoints/step-00000006"));
    words.push_back("--resume");
    const Result resumed = run(job(out, words), ranks(after));
    expect_success(resumed);
    EXPECT_NE(resumed.out.find("resuming after step 3"), std::string::npos) << resumed.out;
    expect_same_losses(whole, out, 1e-6);
  }
}

// Inverse roots and eigenvectors amplify rounding: what one process makes of other micro-batches is the
// measure. That ranks make the same steps from the same gradients is shown in test_sharded_optimizer.cpp, bit
// for bit.
TEST_F(ProgramRanks, AHeadOfItsOwn) {
  prepare();
  const Words untied = {"--model", "gpt2-nano:layers=2,tied=0", "--head", "sign:lr=0.001"};
  expect_success(run(job("one", untied)));
  for (const int N : {2, 3}) {
    const std::string out = "of-" + std::to_string(N);
    expect_success(run(job(out, untied), ranks(N)));
    expect_same_losses("one", out, 1e-6);
  }
}

TEST_F(ProgramRanks, RulesWithMatrixState) {
  prepare();
  const struct {
    std::string rule;
    int tied, untied;  // ranks, with micro-batches of one row and with one each
  } cases[] = {
      {"shampoo", 2, 3}, {"soap", 3, 2}, {"normuon", 3, 4}, {"dion:rank=8", 4, 8}, {"oneside", 8, 2}};
  for (const auto& [rule, tied, untied] : cases)
    for (const int N : {tied, -untied}) {
      const std::string name = rule.substr(0, 4) + (N > 0 ? "-tied-" : "-untied-");
      Words more = {"--hidden", rule, "--steps", "4"};
      if (N < 0) more.insert(more.end(), {"--model", "gpt2-nano:layers=2,tied=0"});
      const auto with_rows = [&](int rows) {
        Words words = more;
        words.insert(words.end(), {"--batch-size", std::to_string(rows)});
        return words;
      };
      expect_success(run(job(name + "1", with_rows(1))));
      expect_success(run(job(name + "N", with_rows(N > 0 ? 1 : 24 / -N)), ranks(std::abs(N))));
      expect_success(run(job(name + "other", with_rows(3))));
      EXPECT_LT(difference(name + "1", name + "N"), 1e-6 + 5 * difference(name + "1", name + "other"))
          << name;
    }
}

// Rank 0's share, where the split is even, and the small sums.
TEST_F(ProgramRanks, ExchangesAreLogged) {
  prepare();
  const Words more = {"--val-every", "0"};
  expect_success(run(job("one", more)));
  expect_success(run(job("two", more), ranks(2)));
  const auto parameters = log("two")[0]["parameters"].get<double>();
  int steps = 0;
  for (const json& line : log("two")) {
    if (line["type"] != "train") continue;
    ++steps;
    EXPECT_NEAR(line["comm_bytes"].get<double>() / (4 * parameters), 1, 0.02);
    EXPECT_GE(line["comm_exposed_ms"], 0.0);
    EXPECT_GE(line["comm_busy_ms"], line["comm_exposed_ms"]);
  }
  EXPECT_EQ(steps, 6);
  for (const json& line : log("one")) EXPECT_FALSE(line.contains("comm_bytes"));
}

TEST_F(ProgramRanks, StepSizesOfTheWholeNetwork) {
  prepare();
  const std::vector<Words> cases = {{"--sharpness", "4096", "--grad-clip", "0"},
                                    {"--escape", "1e-4"},
                                    {"--grad-clip", "0.1", "--qk-clip", "0.05"},
                                    {"--norms-every", "2"}};
  for (size_t i = 0; i < cases.size(); ++i) {
    const std::string one = "one" + std::to_string(i), four = "four" + std::to_string(i);
    expect_success(run(job(one, cases[i])));
    expect_success(run(job(four, cases[i]), ranks(4)));
    expect_same_losses(one, four, 1e-6);
    const auto left = log(one);
    auto right = log(four);
    std::erase_if(right,
                  [](const json& line) { return line["type"] == "slow_rank"; });  // the machine's business
    ASSERT_EQ(left.size(), right.size());
    for (size_t k = 0; k < left.size(); ++k)
      for (const char* key : {"grad_norm", "eta", "max_logit", "predicted", "length"}) {
        if (!left[k].contains(key)) continue;
        EXPECT_NEAR(right[k][key].get<double>() / left[k][key].get<double>(), 1, 1e-4) << key << " " << k;
      }
  }
}

TEST_F(ProgramRanks, BatchesThatCannotBeShared) {
  prepare();
  const auto refused = [&](const Words& more, const Words& launcher, const char* what) {
    const Result result = run(job("refused", more), launcher);
    EXPECT_EQ(result.status, 2) << result.err;
    EXPECT_NE(result.err.find(what), std::string::npos) << result.err;
    EXPECT_EQ(result.err.find("train_gpt: error: "), result.err.rfind("train_gpt: error: "))
        << "more than one line";
  };
  refused({"--global-batch", "25", "--batch-size", "2"}, {}, "--global-batch 25");
  refused({"--global-batch", "24", "--grad-accum", "2"}, {}, "--grad-accum 2");
  refused({"--global-batch", "8"}, ranks(3), "--global-batch 8");
}

TEST_F(ProgramRanks, AKilledRankEndsTheJobAndAnotherNumberResumes) {
  prepare();
  const Words more = {"--steps", "40",     "--val-every", "0",        "--checkpoint-every",
                      "2",       "--keep", "0",           "--hidden", "muon:lr=0.002"};
  expect_success(run(job("whole", more)));
  Random random(11);
  for (const auto& [before, victim, after] : {std::tuple(3, 1, 2), {3, 0, 4}, {2, 1, 1}}) {
    const std::string out = "killed" + std::to_string(before) + std::to_string(victim);
    const pid_t launcher = start(job(out, more), ranks(before));
    const std::vector<pid_t> all = processes(launcher, static_cast<size_t>(before));
    wait_for_steps(out, 3 + random.bits() % 25);
    ASSERT_EQ(kill(all[static_cast<size_t>(victim)], SIGKILL), 0);
    const Result killed = finish(launcher);
    EXPECT_NE(killed.status, 0);
    expect_one_line(killed, "ended without a word");
    Words again = more;
    again.push_back("--resume");
    const Result resumed = run(job(out, again), ranks(after));
    expect_success(resumed);
    EXPECT_NE(resumed.out.find("resuming after step"), std::string::npos) << resumed.out;
    expect_same_losses("whole", out, 1e-6);
  }
}

TEST_F(ProgramRanks, ASignalToOneRankStopsAllAfterTheSameStep) {
  prepare();
  const Words more = {"--steps", "4000", "--val-every", "0", "--hidden", "muon:lr=0.002"};
  const pid_t launcher = start(job("run", more), ranks(3));
  const std::vector<pid_t> all = processes(launcher, 3);
  wait_for_steps("run", 5);
  ASSERT_EQ(kill(all[2], SIGTERM), 0);
  const Result stopped = finish(launcher);
  EXPECT_EQ(stopped.status, 130) << stopped.err;
  EXPECT_EQ(stopped.err, "");
  EXPECT_NE(stopped.out.find("interrupted after step"), std::string::npos) << stopped.out;
  EXPECT_EQ(std::distance(fs::directory_iterator(path("run/checkpoints")), {}), 1);
}

TEST_F(ProgramRanks, RanksThatDifferDoNotTrain) {
  prepare();
  const auto pair = [&](const Words& first, const Words& second) {
    Words words = first;
    words.insert(words.end(), {":", "-np", "1", std::getenv("TRAIN_GPT")});
    words.insert(words.end(), second.begin(), second.end());
    return run(words, ranks(1));
  };
  const auto refused = [&](const Words& second, const char* what) {
    const Result result = pair(job("run"), second);
    EXPECT_NE(result.status, 0);
    expect_one_line(result, what);
    EXPECT_FALSE(fs::exists(path("run/log.jsonl")));
  };
  refused(job("run", {"--seed", "7"}), "rank 1 has seed 7 and rank 0 has 1337");
  refused(job("run", {"--hidden", "muon:lr=0.5"}), "rank 1 has");
  refused(job("run", {"--checkpoint-every", "2"}), "rank 1 has checkpoint_every 2 and rank 0 has 0");
  fs::copy(path("data"), path("other"));
  std::fstream shard(path("other/val_000000.bin"), std::ios::in | std::ios::out | std::ios::binary);
  shard.seekp(1024 + 20);
  shard.write("\x01\x00", 2);
  shard.close();
  Words other = job("run");
  std::replace(other.begin(), other.end(), path("data/val_*.bin"), path("other/val_*.bin"));
  refused(other, "rank 1 has");
}

TEST_F(ProgramRanks, BadUsageIsOneLineOfAllRanks) {
  prepare();
  for (const auto& [words, what] : {std::pair<Words, const char*>{job("run", {"--steps", "many"}), "--steps"},
                                    {job("run", {"--hidden", "moon"}), "moon"},
                                    {{"evaluate", "--model", path("run"), "--data", path("data/val_*.bin")},
                                     "only train runs as several processes"},
                                    {job("run", {"--train", path("nothing_*.bin")}), "nothing_*.bin"}}) {
    const Result result = run(words, ranks(3));
    EXPECT_NE(result.status, 0);
    expect_one_line(result, what);
  }
}

TEST_F(ProgramRanksOnGpu, TrainAsOneDoes) {
  prepare();
  for (const char* dtype : {"fp32", "bf16"}) {
    const Words more = {"--steps", "3", "--dtype", dtype, "--global-batch", "6"};
    const std::string one = std::string("one-") + dtype, three = std::string("three-") + dtype;
    expect_success(run(job(one, more)));
    expect_success(run(job(three, more), ranks(3)));
    expect_same_losses(one, three, dtype == std::string("fp32") ? 1e-6 : 1e-4);
  }
}

// Masters lie at their owners: they are saved there, found again by others, clipped and measured there.
TEST_F(ProgramRanksOnGpu, MastersMoveToOtherRanks) {
  prepare();
  const auto words = [&](const std::string& out, const Words& more) {
    Words all = {"--dtype", "bf16", "--global-batch", "6", "--qk-clip", "0.001", "--norms-every", "2"};
    all.insert(all.end(), more.begin(), more.end());
    return job(out, all);
  };
  expect_success(run(words("whole", {"--steps", "2"})));
  expect_success(run(words("parts", {"--steps", "2", "--checkpoint-every", "1"}), ranks(2)));
  std::filesystem::remove_all(path("parts/checkpoints/step-00000002"));
  expect_success(run(words("parts", {"--steps", "2", "--resume"}), ranks(3)));
  expect_same_losses("whole", "parts", 1e-4);
}

// Numbers of the host that travel with those of the GPU, before the directions and after them.
TEST_F(ProgramRanksOnGpu, StepSizesOfTheWholeNetwork) {
  prepare();
  for (const char* measure : {"--sharpness=4096", "--escape=1e-3"}) {
    const Words more = {"--model",        "gpt2-nano:layers=1,channels=24",
                        "--steps",        "5",
                        "--global-batch", "6",
                        "--val-every",    "0",
                        measure};
    const std::string name = std::string(measure).substr(2, 3);
    expect_success(run(job(name + "1", more)));
    expect_success(run(job(name + "3", more), ranks(3)));
    expect_same_losses(name + "1", name + "3", 1e-6);
    std::vector<double> sizes;
    for (const json& line : log(name + "3"))
      if (line["type"] == "train") sizes.push_back(line.value("eta", line["lr"].get<double>()));
    ASSERT_EQ(sizes.size(), 5u);
    EXPECT_NE(sizes.front(), sizes.back());
  }
}
