#include "tests/program_fixture.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "json_text.h"
#include "random.h"

std::string read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::string fmt_loss(double loss) {
  char text[32];
  std::snprintf(text, sizeof text, "%.6f", loss);
  return text;
}

void ProgramTest::SetUp() {
  const char* binary = std::getenv(variable_);
  if (binary == nullptr) GTEST_SKIP() << "set " << variable_ << " to the program to test";
  binary_ = binary;
}

pid_t ProgramTest::start(const Words& words, const Words& launcher) {
  Words all = launcher;
  all.push_back(binary_);
  all.insert(all.end(), words.begin(), words.end());
  std::vector<char*> argv;
  for (std::string& word : all) argv.push_back(word.data());
  argv.push_back(nullptr);
  const std::string out = path("stdout"), err = path("stderr");
  const pid_t child = fork();
  if (child == 0) {
    dup2(open(out.c_str(), O_CREAT | O_TRUNC | O_WRONLY, 0644), STDOUT_FILENO);
    dup2(open(err.c_str(), O_CREAT | O_TRUNC | O_WRONLY, 0644), STDERR_FILENO);
    execvp(argv[0], argv.data());
    _exit(127);
  }
  return child;
}

Result ProgramTest::finish(pid_t child) {
  int status = 0;
  waitpid(child, &status, 0);
  return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), read(path("stdout")),
          read(path("stderr"))};
}

void ProgramTest::prepare() {
  Random random(7);
  std::ofstream text(path("text.txt"));
  const char* words[] = {"the", "light", "and", "day", "night", "water", "was", "good", "said", "earth"};
  for (int line = 0; line < 2000; ++line) {
    for (int i = 0; i < 8; ++i) text << words[random.bits() % 10] << (i < 7 ? " " : ".\n");
    if (line % 400 == 399) text << "<|endoftext|>\n";
  }
  text.close();
  const Result result =
      run({"prepare", "--text", path("text.txt"), "--out", path("data"), "--val-fraction", "0.1"});
  ASSERT_EQ(result.status, 0) << result.err;
}

Words ProgramTest::train(const std::string& out, const Words& more) {
  Words words = {"train",
                 "--train",
                 path("data/train_*.bin"),
                 "--val",
                 path("data/val_*.bin"),
                 "--out",
                 path(out),
                 "--model",
                 "gpt2-nano",
                 "--batch-size",
                 "4",
                 "--seq-len",
                 "32",
                 "--steps",
                 "12",
                 "--val-every",
                 "6",
                 "--val-tokens",
                 "512"};
  words.insert(words.end(), more.begin(), more.end());
  return words;
}

std::vector<json> ProgramTest::log(const std::string& out) {
  std::vector<json> lines;
  std::ifstream file(path(out + "/log.jsonl"));
  for (std::string line; std::getline(file, line);) lines.push_back(require_json(line));
  return lines;
}

std::map<std::pair<std::string, int>, double> ProgramTest::losses(const std::string& out) {
  std::map<std::pair<std::string, int>, double> found;
  for (const json& line : log(out)) {
    if (!line.contains("loss")) continue;
    const bool first = found.emplace(std::pair(line["type"], line["step"]), line["loss"]).second;
    EXPECT_TRUE(first) << "twice: " << json_text(line);
  }
  return found;
}

void ProgramTest::expect_error(const Words& words, int status, const Words& parts) {
  const Result result = run(words);
  std::string command;
  for (const std::string& word : words) command += " " + word;
  SCOPED_TRACE(command + "\n" + result.err);
  EXPECT_EQ(result.status, status);
  EXPECT_TRUE(result.err.starts_with("train_gpt: error: "));
  EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1);
  for (const std::string& part : parts) EXPECT_NE(result.err.find(part), std::string::npos) << part;
}

void ProgramTest::expect_same_checkpoint(const std::string& a, const std::string& b,
                                         const std::string& step) {
  for (const char* file : {"model.safetensors", "optimizer.safetensors", "config.json", "tokenizer.json"}) {
    const std::string left = read(path(a + "/checkpoints/" + step + "/" + file));
    EXPECT_FALSE(left.empty()) << file;
    EXPECT_TRUE(left == read(path(b + "/checkpoints/" + step + "/" + file))) << file;
  }
}
