// The program as a job of several processes under mpirun, from the outside: what its tests share.
#pragma once

#include <signal.h>

#include <chrono>
#include <cmath>
#include <fstream>
#include <sstream>
#include <thread>

#include "tests/program_fixture.h"

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
  /// The largest relative difference between the losses of two runs.
  double difference(const std::string& a, const std::string& b) {
    const auto left = losses(a), right = losses(b);
    double most = left.size() == right.size() && !left.empty() ? 0 : 1;
    for (const auto& [key, loss] : left) most = std::max(most, std::abs(right.at(key) / loss - 1));
    return most;
  }
  /// The processes of the program that the launcher has started so far, waiting until there are N.
  static std::vector<pid_t> processes(pid_t launcher, size_t N) {
    for (int tries = 0; tries < 2000; ++tries) {
      std::vector<pid_t> found;
      const std::string path =
          "/proc/" + std::to_string(launcher) + "/task/" + std::to_string(launcher) + "/children";
      std::ifstream children(path);
      for (pid_t child; children >> child;) found.push_back(child);
      if (found.size() == N) return found;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    ADD_FAILURE() << "the launcher started no " << N << " processes";
    return {};
  }
  /// Waits until the run has logged so many steps.
  void wait_for_steps(const std::string& out, size_t steps) {
    for (int tries = 0; tries < 4000; ++tries) {
      const std::string text = read(path(out + "/log.jsonl"));
      size_t lines = 0;
      for (size_t at = 0; (at = text.find("\"train\",", at)) != std::string::npos; ++at) ++lines;
      if (lines >= steps) return;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    ADD_FAILURE() << "no " << steps << " steps in " << out;
  }
  /// One line of the program; the MPI library may say in lines of its own, "[host:process] ...", what it
  /// missed.
  static void expect_one_line(const Result& result, const std::string& part) {
    std::istringstream lines(result.err);
    Words ours;
    for (std::string line; std::getline(lines, line);)
      if (!line.starts_with("[")) ours.push_back(line);
    ASSERT_EQ(ours.size(), 1u) << result.err;
    EXPECT_TRUE(ours[0].starts_with("train_gpt: error: ")) << result.err;
    EXPECT_NE(ours[0].find(part), std::string::npos) << result.err;
  }
  void expect_success(const Result& result) { ASSERT_EQ(result.status, 0) << result.out << result.err; }

 private:
  Build build_;
};
