// The program as a job of several processes under mpirun, from the outside.
#include <cmath>

#include "tests/program_fixture.h"

namespace {
/// Parameter: the variable that names the program, and the device that it is told to use.
struct Build {
  const char* variable;
  const char* device;
};

class ProgramRanks : public ProgramTest {
 protected:
  explicit ProgramRanks(Build build = {"TRAIN_GPT", "cpu"}) : ProgramTest(build.variable), build_(build) {}
  void SetUp() override {
    ProgramTest::SetUp();
    if (IsSkipped()) return;
    if (std::system("command -v mpirun >/dev/null") != 0) GTEST_SKIP() << "no mpirun";
  }
  /// mpirun with N ranks, of one thread each.
  static Words ranks(int N) {
    return {"mpirun", "-q",  "--allow-run-as-root", "--oversubscribe", "--bind-to",
            "none",   "-np", std::to_string(N)};
  }
  /// A run with 24 rows in each update, whatever the number of ranks.
  Words job(const std::string& out, const Words& more = {}) {
    Words words =
        train(out, {"--device", build_.device, "--dtype", "fp32", "--threads", "1", "--batch-size", "1",
                    "--global-batch", "24", "--seq-len", "16", "--steps", "6", "--val-every", "3"});
    words.insert(words.end(), more.begin(), more.end());
    return words;
  }
  void expect_same_losses(const std::string& a, const std::string& b, double tolerance) {
    const auto left = losses(a), right = losses(b);
    ASSERT_EQ(left.size(), right.size());
    ASSERT_FALSE(left.empty());
    for (const auto& [key, loss] : left)
      EXPECT_NEAR(right.at(key), loss, tolerance * loss) << b << " " << key.first << " " << key.second;
  }
  void expect_success(const Result& result) { ASSERT_EQ(result.status, 0) << result.out << result.err; }

 private:
  Build build_;
};

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
  expect_success(run(job("whole")));
  const Words saving = {"--checkpoint-every", "3"};
  for (const auto& [before, after] : {std::pair(1, 3), {4, 1}, {3, 8}}) {
    const std::string out = "from" + std::to_string(before) + "to" + std::to_string(after);
    expect_success(run(job(out, saving), ranks(before)));
    fs::remove_all(path(out + "/checkpoints/step-00000006"));
    const Result resumed = run(job(out, {"--checkpoint-every", "3", "--resume"}), ranks(after));
    expect_success(resumed);
    EXPECT_NE(resumed.out.find("resuming after step 3"), std::string::npos) << resumed.out;
    expect_same_losses("whole", out, 1e-6);
  }
}

TEST_F(ProgramRanks, RulesWithMatrixState) {
  prepare();
  for (const char* rule : {"shampoo", "soap", "normuon", "dion:rank=8", "oneside"}) {
    const std::string name(rule);
    const std::string one = "one-" + name.substr(0, 4), three = "three-" + name.substr(0, 4);
    expect_success(run(job(one, {"--hidden", rule, "--steps", "4"})));
    expect_success(run(job(three, {"--hidden", rule, "--steps", "4"}), ranks(3)));
    expect_same_losses(one, three, 1e-5);
  }
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
    const auto left = log(one), right = log(four);
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
  refused({"--global-batch", "25"}, {}, "--global-batch 25");
  refused({"--global-batch", "24", "--grad-accum", "2"}, {}, "--grad-accum 2");
  refused({"--global-batch", "8"}, ranks(3), "--global-batch 8");
}

TEST_F(ProgramRanksOnGpu, TrainAsOneDoes) {
  prepare();
  for (const char* dtype : {"fp32", "bf16"}) {
    const Words more = {"--steps", "3", "--dtype", dtype, "--global-batch", "6"};
    const std::string one = std::string("one-") + dtype, three = std::string("three-") + dtype;
    expect_success(run(job(one, more)));
    expect_success(run(job(three, more), ranks(3)));
    expect_same_losses(one, three, dtype == std::string("fp32") ? 1e-6 : 2e-3);
  }
}
