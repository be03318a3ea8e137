// --qk-clip from the outside, on the CPU and on the CUDA path. Needs the binaries in $TRAIN_GPT and
// $TRAIN_GPT_GPU.
#include "tests/program_fixture.h"

namespace {
/// Both programs train with a threshold so low that every step clips.
class QkClipProgram : public ProgramTest {
 protected:
  using ProgramTest::ProgramTest;
  std::vector<double> max_logits(const std::string& out) {
    std::vector<double> values;
    for (const json& line : log(out))
      if (line["type"] == "train" && line.contains("max_logit")) values.push_back(line["max_logit"]);
    return values;
  }
  void check_resume(const Words& machine) {
    prepare();
    Words more = {"--qk-clip",    "0.05", "--steps",      "4", "--val-every", "4",
                  "--grad-accum", "2",    "--batch-size", "2"};
    more.insert(more.end(), machine.begin(), machine.end());
    const Result whole = run(train("whole", more));
    ASSERT_EQ(whole.status, 0) << whole.err;
    more.insert(more.end(), {"--checkpoint-every", "2"});
    ASSERT_EQ(run(train("parts", more)).status, 0);
    fs::remove_all(path("parts/checkpoints/step-00000004"));
    more.push_back("--resume");
    const Result resumed = run(train("parts", more));
    ASSERT_EQ(resumed.status, 0) << resumed.err;
    EXPECT_NE(resumed.out.find("resuming after step 2"), std::string::npos) << resumed.out;
    expect_same_checkpoint("whole", "parts", "step-00000004");
    EXPECT_EQ(losses("whole"), losses("parts"));
    EXPECT_EQ(max_logits("whole").size(), 4u);
    EXPECT_EQ(max_logits("whole"), max_logits("parts"));
  }
};
class QkClipOnCpu : public QkClipProgram {
 protected:
  QkClipOnCpu() : QkClipProgram("TRAIN_GPT") {}
};
class QkClipOnGpu : public QkClipProgram {
 protected:
  QkClipOnGpu() : QkClipProgram("TRAIN_GPT_GPU") {}
};
}  // namespace

TEST_F(QkClipOnCpu, HoldsTheLogitsAndLogsThem) {
  prepare();
  ASSERT_EQ(run(train("plain", {})).status, 0);
  EXPECT_TRUE(max_logits("plain").empty());
  ASSERT_EQ(run(train("watched", {"--qk-clip", "1000"})).status, 0);  // never reached
  EXPECT_EQ(losses("watched"), losses("plain"));
  const Result clipped = run(train("clipped", {"--qk-clip", "0.05:alpha=0.4"}));
  ASSERT_EQ(clipped.status, 0) << clipped.err;
  EXPECT_NE(clipped.out.find("qk-clip"), std::string::npos) << clipped.out;
  const std::vector<double> free = max_logits("watched"), held = max_logits("clipped");
  ASSERT_EQ(free.size(), 12u);
  ASSERT_EQ(held.size(), 12u);
  EXPECT_EQ(held[0], free[0]);  // what the first step saw
  EXPECT_GT(free.back(), 0.12);
  for (size_t i = 1; i < held.size(); ++i) EXPECT_LT(held[i], 0.1) << i;  // a step adds a little to 0.05
  EXPECT_NE(losses("clipped"), losses("plain"));
}

TEST_F(QkClipOnCpu, ResumeEqualsTheUninterruptedRun) {
  check_resume({});
  Words other = train(
      "parts", {"--steps", "4", "--val-every", "4", "--grad-accum", "2", "--batch-size", "2", "--resume"});
  expect_error(other, 1, {"qk_clip", "state.json"});
  other.insert(other.end(), {"--qk-clip", "0.06"});
  expect_error(other, 1, {"qk_clip", "0.06", "0.05"});
}

TEST_F(QkClipOnGpu, ResumeEqualsTheUninterruptedRun) {
  check_resume({"--device", "cuda", "--dtype", "bf16"});
}

TEST_F(QkClipOnCpu, BadUsageIsOneLine) {
  prepare();
  expect_error(train("run", {"--qk-clip", "much"}), 2, {"much", "--qk-clip"});
  expect_error(train("run", {"--qk-clip", "0"}), 2, {"--qk-clip"});
  expect_error(train("run", {"--qk-clip", "100:alpha=3"}), 2, {"alpha=3", "--qk-clip"});
  EXPECT_EQ(run({"info", "--model", "gpt2-nano"}).out.find("qk-clip"), std::string::npos);
  EXPECT_NE(run({"info", "--model", "gpt2-nano", "--qk-clip", "100"}).out.find("qk-clip"), std::string::npos);
}
