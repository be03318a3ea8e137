// The program on its CUDA path, from the outside: in the executor, or on a GPU. Needs a binary with CUDA
// halves in $TRAIN_GPT_GPU.
#include "tests/program_fixture.h"

namespace {
class ProgramOnGpu : public ProgramTest {
 protected:
  ProgramOnGpu() : ProgramTest("TRAIN_GPT_GPU") {}

  /// A run of a few steps that logs all it does.
  Words train_on(const std::string& device, const std::string& dtype, const std::string& out,
                 const Words& more = {}) {
    Words words = train(out, {"--device", device, "--dtype", dtype, "--steps", "6", "--val-every", "3"});
    words.insert(words.end(), more.begin(), more.end());
    return words;
  }
};
}  // namespace

TEST_F(ProgramOnGpu, TrainsAsTheCpuDoes) {
  prepare();
  for (const std::string recipe : {"muon", "adamw"}) {
    ASSERT_EQ(run(train_on("cpu", "fp32", "cpu-" + recipe, {"--recipe", recipe})).status, 0);
    const Result exact = run(train_on("cuda", "fp32", "fp32-" + recipe, {"--recipe", recipe}));
    ASSERT_EQ(exact.status, 0) << exact.err;
    ASSERT_EQ(run(train_on("cuda", "bf16", "bf16-" + recipe, {"--recipe", recipe})).status, 0);
    const auto cpu = losses("cpu-" + recipe), fp32 = losses("fp32-" + recipe),
               bf16 = losses("bf16-" + recipe);
    ASSERT_EQ(cpu.size(), fp32.size());
    ASSERT_EQ(cpu.size(), bf16.size());
    for (const auto& [key, loss] : cpu) {
      EXPECT_NEAR(fp32.at(key), loss, 1e-4) << recipe << " " << key.first << " " << key.second;
      EXPECT_NEAR(bf16.at(key), loss, 0.02) << recipe << " " << key.first << " " << key.second;
    }
  }
}

TEST_F(ProgramOnGpu, ResumeEqualsTheUninterruptedRun) {
  prepare();
  ASSERT_EQ(run(train_on("cuda", "bf16", "whole")).status, 0);
  ASSERT_EQ(run(train_on("cuda", "bf16", "parts", {"--checkpoint-every", "2"})).status, 0);
  fs::remove_all(path("parts/checkpoints/step-00000006"));
  const Result resumed = run(train_on("cuda", "bf16", "parts", {"--checkpoint-every", "2", "--resume"}));
  ASSERT_EQ(resumed.status, 0) << resumed.err;
  EXPECT_NE(resumed.out.find("resuming after step 4"), std::string::npos) << resumed.out;
  expect_same_checkpoint("whole", "parts", "step-00000006");
  EXPECT_EQ(losses("whole"), losses("parts"));
}

TEST_F(ProgramOnGpu, ACheckpointServesBothDevices) {
  prepare();
  ASSERT_EQ(run(train_on("cuda", "fp32", "run", {"--grad-accum", "2"})).status, 0);
  const Words evaluate = {"evaluate", "--model", path("run"), "--data", path("data/val_*.bin"),
                          "--tokens", "512"};
  const auto on = [&](const Words& command, const std::string& device) {
    Words words = command;
    words.insert(words.end(), {"--device", device, "--dtype", "fp32"});
    const Result result = run(words);
    EXPECT_EQ(result.status, 0) << result.err;
    return result.out;
  };
  EXPECT_EQ(on(evaluate, "cpu").substr(0, 9),
            on(evaluate, "cuda").substr(0, 9));  // "loss 5.12": two decimals
  const Words generate = {"generate", "--model", path("run"),     "--prompt", "the ",
                          "--tokens", "12",      "--temperature", "0"};
  EXPECT_EQ(on(generate, "cpu"), on(generate, "cuda"));
}

TEST_F(ProgramOnGpu, ANonFiniteLossStopsWithStepTensorAndCheckpoint) {
  prepare();
  const Result result =
      run(train_on("cuda", "fp32", "run",
                   {"--steps", "30", "--checkpoint-every", "1", "--keep", "0", "--hidden", "sgd:lr=1e6",
                    "--embedding", "sgd:lr=1e6", "--position", "sgd:lr=1e6", "--vector", "sgd:lr=1e6",
                    "--schedule", "constant", "--grad-clip", "0"}));
  EXPECT_EQ(result.status, 1);
  for (const char* part : {"not finite", "step "})
    EXPECT_NE(result.err.find(part), std::string::npos) << result.err;
  EXPECT_TRUE(result.err.find(".weight") != std::string::npos ||
              result.err.find(".bias") != std::string::npos)
      << result.err;
  EXPECT_FALSE(read(path("run/checkpoints/step-00000001/model.safetensors")).empty());
}

TEST_F(ProgramOnGpu, InfoNamesTheDeviceAndTheLargestBatch) {
  prepare();
  const Result result =
      run({"info", "--model", "gpt2", "--device", "cuda", "--batch-size", "1", "--seq-len", "1024"});
  EXPECT_EQ(result.status, 0) << result.err;
  for (const char* part : {"device", "bf16", "would fit", "parameters in bf16"})
    EXPECT_NE(result.out.find(part), std::string::npos) << result.out;
}
