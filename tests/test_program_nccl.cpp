// The program on several GPUs over NCCL, started by mpirun and without it. In the executor each rank has a
// GPU of its own, and the executor's NCCL.
#include <fmt/format.h>

#include "tests/free_port.h"
#include "tests/program_ranks_fixture.h"

namespace {
class ProgramOverNccl : public ProgramRanks {
 protected:
  ProgramOverNccl() : ProgramRanks({"TRAIN_GPT_GPU", "cuda"}) {}
  void SetUp() override {
    ProgramRanks::SetUp();
    if (IsSkipped()) return;
    setenv("CUDA_ON_CPU_DEVICES", "8", 1);
    prepare();
  }
  void TearDown() override { unsetenv("CUDA_ON_CPU_DEVICES"); }

  /// N ranks as torchrun and schedulers start them.
  static Words ranks_without_mpi(int N) {
    const std::string script = fmt::format(
        "for r in $(seq 0 {}); do RANK=$r WORLD_SIZE={} MASTER_ADDR=127.0.0.1 MASTER_PORT={} \"$@\" & "
        "pids=\"$pids $!\"; done; for p in $pids; do wait $p || status=$?; done; exit ${{status:-0}}",
        N - 1, N, free_port());
    return {"sh", "-c", script, "sh"};
  }
  Words small(const std::string& out, const Words& more = {}) {
    Words words = job(
        out, {"--model", "gpt2-nano:layers=2,channels=32,heads=2", "--steps", "4", "--global-batch", "6"});
    words.insert(words.end(), more.begin(), more.end());
    return words;
  }
};
}  // namespace

// Late streams show who misses a wait for an exchange; random ones also an exchange that misses a wait for
// what it sends.
TEST_F(ProgramOverNccl, RanksTrainAsOneDoes) {
  const char* const before = std::getenv("CUDA_ON_CPU_STREAMS");
  const std::string streams = before != nullptr ? before : "eager";
  for (const char* dtype : {"fp32", "bf16"}) {
    setenv("CUDA_ON_CPU_STREAMS", dtype == std::string("fp32") ? "random:1" : "late", 1);
    const std::string one = std::string("one-") + dtype, three = std::string("three-") + dtype;
    expect_success(run(small(one, {"--dtype", dtype})));
    const Result result = run(small(three, {"--dtype", dtype}), ranks(3));
    expect_success(result);
    EXPECT_NE(result.out.find("3 ranks over NCCL"), std::string::npos) << result.out;
    expect_same_losses(one, three, dtype == std::string("fp32") ? 1e-6 : 1e-4);
  }
  setenv("CUDA_ON_CPU_STREAMS", streams.c_str(), 1);
}

TEST_F(ProgramOverNccl, StepSizesOfTheWholeNetworkAndTelemetry) {
  for (const char* measure : {"--sharpness=4096", "--escape=1e-3"}) {
    const std::string name = std::string(measure).substr(2, 3);
    expect_success(run(small(name + "1", {measure, "--norms-every", "2"})));
    expect_success(run(small(name + "3", {measure, "--norms-every", "2"}), ranks(3)));
    expect_same_losses(name + "1", name + "3", 1e-6);
  }
}

TEST_F(ProgramOverNccl, RanksThatMpiDidNotStartDoTheSame) {
  const Words muon = {"--hidden", "muon:lr=0.002"};
  expect_success(run(small("mpi", muon), ranks(2)));
  const Result result = run(small("alone", muon), ranks_without_mpi(2));
  expect_success(result);
  EXPECT_NE(result.out.find("2 ranks over NCCL"), std::string::npos) << result.out;
  EXPECT_EQ(losses("mpi"), losses("alone"));
}

TEST_F(ProgramOverNccl, AKilledRankEndsTheJobAndAnotherNumberResumes) {
  const Words more = {"--steps", "12",       "--val-every",  "0", "--checkpoint-every",
                      "2",       "--hidden", "muon:lr=0.002"};
  expect_success(run(small("whole", more)));
  const pid_t launcher = start(small("killed", more), ranks_without_mpi(3));
  const std::vector<pid_t> all = processes(launcher, 3);
  wait_for_steps("killed", 4);
  ASSERT_EQ(kill(all[1], SIGKILL), 0);
  const Result killed = finish(launcher);
  EXPECT_NE(killed.status, 0);
  EXPECT_NE(killed.err.find("rank 1 "), std::string::npos) << killed.err;
  EXPECT_NE(killed.err.find("ended without a word"), std::string::npos) << killed.err;
  Words again = more;
  again.push_back("--resume");
  expect_success(run(small("killed", again), ranks(2)));
  expect_same_losses("whole", "killed", 1e-6);
}
