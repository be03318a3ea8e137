// Runs train_gpt as a person or a script would, on a small corpus in a folder that is removed afterwards.
#pragma once

#include <gtest/gtest.h>
#include <sys/types.h>

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "tests/temporary_folder.h"

namespace fs = std::filesystem;
using nlohmann::json;
using Words = std::vector<std::string>;

std::string read(const fs::path& path);

/// A loss as the program prints it.
std::string fmt_loss(double loss);

struct Result {
  int status;  // exit status, or 128 + signal
  std::string out, err;
};

class ProgramTest : public testing::Test {
 protected:
  /// The program is named by an environment variable.
  explicit ProgramTest(const char* variable) : variable_(variable) {}
  void SetUp() override;
  std::string path(const std::string& name) const { return folder_.path(name); }

  /// Starts the program, behind the words of a launcher if there is one; output goes to files, so that
  /// nothing blocks.
  pid_t start(const Words& words, const Words& launcher = {});
  Result finish(pid_t child);
  Result run(const Words& words, const Words& launcher = {}) { return finish(start(words, launcher)); }

  /// A small corpus of words with some structure, prepared once per test.
  void prepare();
  /// A tiny training run into OUT; `more` comes last and wins.
  Words train(const std::string& out, const Words& more = {});
  std::vector<json> log(const std::string& out);
  /// The losses of the log, by type and step.
  std::map<std::pair<std::string, int>, double> losses(const std::string& out);
  /// One line on standard error that says "train_gpt: error: ..." and holds all of `parts`.
  void expect_error(const Words& words, int status, const Words& parts);
  void expect_same_checkpoint(const std::string& a, const std::string& b, const std::string& step);

 private:
  TemporaryFolder folder_;
  const char* variable_;
  std::string binary_;
};
