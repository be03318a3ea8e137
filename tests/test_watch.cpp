// Jobs of several processes in which something goes wrong, and every line that they print about it.
#include "watch.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <csignal>
#include <functional>
#include <future>
#include <nlohmann/json.hpp>
#include <random>
#include <regex>
#include <thread>

#include "error.h"
#include "files.h"
#include "tests/temporary_folder.h"
#include "watch_socket.h"

namespace {
constexpr int kMost = 8;  // ranks

/// Where the processes of a job meet, in memory that they share.
struct Board {
  std::array<std::atomic<int64_t>, kMost> at;  // the step that a rank is in
  std::atomic<bool> go;
};

/// Nothing here ends a job early unless the test wants it: the machine may be slow.
WatchOptions patient() {
  return {.patience = 100, .silence = 100, .join = 100, .beat = 0.05, .grace = 0.5};
}

/// Processes forked from the test, one per rank, with a Watch each.
class Job {
 public:
  using Work = std::function<void(Watch& watch, int rank, Board& board)>;
  using Broadcast = std::function<std::string(int rank, std::string text)>;

  Job(int ranks, const WatchOptions& options, const Work& work, const Broadcast& change = {})
      : board_(static_cast<Board*>(
            mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0))) {
    for (auto& at : board_->at) at = -1;
    std::vector<std::array<int, 2>> pipes(static_cast<size_t>(ranks));
    for (auto& ends : pipes) EXPECT_EQ(pipe(ends.data()), 0);
    std::fflush(stdout);
    for (int rank = 0; rank < ranks; ++rank) {
      const pid_t child = fork();
      if (child == 0) be_rank(rank, ranks, options, work, change, pipes);
      children_.push_back(child);
    }
    for (const auto& ends : pipes) {
      close(ends[0]);
      close(ends[1]);
    }
  }
  ~Job() {
    wait();
    munmap(board_, sizeof(Board));
  }
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  Board& board() { return *board_; }
  /// "rank 2 (host, process 123)"
  std::string who(int rank) const {
    return fmt::format("rank {} ({}, process {})", rank, host_name(), children_[static_cast<size_t>(rank)]);
  }
  /// Sends a signal; when it stops or kills the process, returns when that has happened.
  void signal(int rank, int number) {
    const pid_t child = children_[static_cast<size_t>(rank)];
    kill(child, number);
    siginfo_t info;
    if (number == SIGSTOP) waitid(P_PID, static_cast<id_t>(child), &info, WSTOPPED | WNOWAIT);
    if (number == SIGKILL) waitid(P_PID, static_cast<id_t>(child), &info, WEXITED | WNOWAIT);
  }
  /// Exit statuses by rank, 128 + signal for those that were killed; waits for the end of all.
  std::vector<int> wait() {
    for (size_t rank = statuses_.size(); rank < children_.size(); ++rank) {
      int status = 0;
      waitpid(children_[rank], &status, 0);
      statuses_.push_back(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    }
    return statuses_;
  }
  /// The exit status of one rank.
  void wait_for(int rank) {
    siginfo_t info;
    waitid(P_PID, static_cast<id_t>(children_[static_cast<size_t>(rank)]), &info, WEXITED | WNOWAIT);
  }
  /// All that all ranks have written to standard error.
  std::string err() const { return folder_.read("stderr"); }

 private:
  [[noreturn]] void be_rank(int rank, int ranks, const WatchOptions& options, const Work& work,
                            const Broadcast& change, const std::vector<std::array<int, 2>>& pipes) {
    alarm(60);  // a test that hangs fails
    dup2(open(folder_.path("stderr").c_str(), O_CREAT | O_APPEND | O_WRONLY, 0644), STDERR_FILENO);
    const auto broadcast = [&](const std::string& text) {
      std::string all = text;
      if (rank == 0) {
        for (size_t to = 1; to < pipes.size(); ++to)
          if (write(pipes[to][1], (text + "\n").data(), text.size() + 1) < 0) _exit(99);
      } else {
        for (char c = 0; read(pipes[static_cast<size_t>(rank)][0], &c, 1) == 1 && c != '\n';) all += c;
      }
      return change ? change(rank, all) : all;
    };
    _exit(run_rank(rank, ranks, options, work, broadcast));
  }
  /// As main() does it.
  int run_rank(int rank, int ranks, const WatchOptions& options, const Work& work,
               const Watch::Broadcast& broadcast) {
    const auto print = [](const std::exception& error, int status) {
      fmt::print(stderr, "train_gpt: error: {}\n", error.what());
      return status;
    };
    try {
      Watch watch(rank, ranks, broadcast, options);
      try {
        work(watch, rank, *board_);
      } catch (const UsageError& error) {
        watch.fail(error.what(), 2);
        throw;
      } catch (const std::exception& error) {
        watch.fail(error.what(), 1);
        throw;
      }
    } catch (const std::exception& error) {
      return print(error, 1);
    }
    return 0;
  }

  TemporaryFolder folder_;
  Board* board_;
  std::vector<pid_t> children_;
  std::vector<int> statuses_;
};

/// What a communication backend does: waits for others.
void wait_until(Watch& watch, const std::function<bool()>& condition) {
  while (!condition()) {
    watch.check();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

/// Starts a step and waits for all to be in it, as an exchange of gradients would.
void exchange(Watch& watch, int rank, int ranks, Board& board, int64_t step) {
  if (!watch.start_step(step)) throw std::logic_error("nobody asked to stop");
  board.at[static_cast<size_t>(rank)] = step;
  wait_until(watch, [&] {
    return std::all_of(board.at.begin(), board.at.begin() + ranks,
                       [&](const auto& at) { return at >= step; });
  });
}

/// A main thread that is blocked where nothing reaches it.
[[noreturn]] void block() {
  while (true) pause();
}

const std::string kContinue = "continue with --resume from the last checkpoint";

// ---------------------------------------------------------------------------------------------------- no
// failure
TEST(Watch, AJobThatGoesWellSaysNothing) {
  Job job(4, patient(), [](Watch& watch, int rank, Board& board) {
    watch.agree({{"--steps", "3"}, {"the program", program_fingerprint()}});
    for (int64_t step = 0; step < 3; ++step) {
      exchange(watch, rank, 4, board, step);
      watch.compare(step, 17);
    }
    if (rank != 1) wait_until(watch, [&] { return board.go.load(); });
  });
  job.wait_for(1);  // its goodbye is no loss to the others
  job.board().go = true;
  EXPECT_EQ(job.wait(), (std::vector<int>{0, 0, 0, 0}));
  EXPECT_EQ(job.err(), "");
}

TEST(Watch, Alone) {
  const auto nobody = [](const std::string&) -> std::string { throw std::logic_error("there is nobody"); };
  Watch watch(0, 1, nobody);
  watch.agree({{"a", "b"}});
  watch.compare(0, 1);
  watch.check();
  watch.worked(1);
  watch.fail("somebody else prints it");
  EXPECT_TRUE(watch.paces().empty());
  EXPECT_EQ(watch.slow_rank(), "");
  EXPECT_TRUE(watch.start_step(7));
  EXPECT_EQ(watch.stop_step(), -1);
  watch.request_stop();
  EXPECT_EQ(watch.stop_step(), 8);
  EXPECT_FALSE(watch.start_step(8));
  watch.request_stop();
  EXPECT_FALSE(watch.start_step(8));
}

// ---------------------------------------------------------------------------------------------------------
// deaths
TEST(Watch, AKilledRankEndsTheJobWhateverTheOthersDo) {
  Job job(4, patient(), [](Watch& watch, int rank, Board& board) {
    for (int64_t step = 0; step < 4; ++step) exchange(watch, rank, 4, board, step);
    if (rank == 1) block();
    if (rank == 2) kill(getpid(), SIGKILL);
    wait_until(watch, [] { return false; });
  });
  EXPECT_EQ(job.wait(), (std::vector<int>{1, 1, 128 + SIGKILL, 1}));
  EXPECT_EQ(job.err(),
            fmt::format("train_gpt: error: {} ended without a word, in step 3, {}\n", job.who(2), kContinue));
}

TEST(Watch, TheLineSaysWhatTheRankDid) {
  Job job(2, patient(), [](Watch& watch, int rank, Board& board) {
    exchange(watch, rank, 2, board, 0);
    const auto outer = watch.now("validating");
    { const auto inner = watch.now("sampling"); }
    watch.compare(0, 0);  // so that rank 0 has heard all this
    if (rank == 1) _exit(0);
    wait_until(watch, [] { return false; });
  });
  EXPECT_EQ(job.wait(), (std::vector<int>{1, 0}));
  EXPECT_EQ(job.err(), fmt::format("train_gpt: error: {} ended without a word, in step 0, validating, {}\n",
                                   job.who(1), kContinue));
}

TEST(Watch, RankZeroIsKilled) {
  Job job(4, patient(), [](Watch& watch, int rank, Board& board) {
    for (int64_t step = 0; step < 3; ++step) exchange(watch, rank, 4, board, step);
    if (rank == 0) kill(getpid(), SIGKILL);
    if (rank == 3) block();
    wait_until(watch, [] { return false; });
  });
  EXPECT_EQ(job.wait(), (std::vector<int>{128 + SIGKILL, 1, 1, 1}));
  EXPECT_EQ(job.err(),
            fmt::format("train_gpt: error: {} ended without a word, in step 2, {}\n", job.who(0), kContinue));
}

TEST(Watch, RanksZeroAndOneAreKilled) {
  Job job(5, patient(), [](Watch& watch, int rank, Board& board) {
    exchange(watch, rank, 5, board, 0);
    board.go = true;
    wait_until(watch, [] { return false; });
  });
  while (!job.board().go) std::this_thread::yield();
  job.signal(0, SIGSTOP);  // so that it cannot say anything about rank 1
  job.signal(1, SIGKILL);
  job.signal(0, SIGKILL);
  EXPECT_EQ(job.wait(), (std::vector<int>{128 + SIGKILL, 128 + SIGKILL, 1, 1, 1}));
  EXPECT_EQ(job.err(),
            fmt::format("train_gpt: error: {} ended without a word, in step 0, {}\n", job.who(0), kContinue));
}

TEST(Watch, RankZeroListensUntilAllHaveSaidGoodbye) {
  Job job(2, patient(), [](Watch& watch, int rank, Board& board) {
    board.at[static_cast<size_t>(rank)] = 100;
    if (rank == 0) return;
    wait_until(watch, [&] { return board.at[0] == 100; });
    throw RunError("no space");
  });
  EXPECT_EQ(job.wait(), (std::vector<int>{1, 1}));
  EXPECT_EQ(job.err(), "train_gpt: error: rank 1: no space\n");
}

// -----------------------------------------------------------------------------------------------------
// exceptions
TEST(Watch, ARankThrowsAndTheOthersUnwind) {
  const TemporaryFolder folder;
  Job job(3, patient(), [&](Watch& watch, int rank, Board& board) {
    const std::string name = folder.path(std::to_string(rank));
    FileWriter unfinished(name, Existing::refuse);
    exchange(watch, rank, 3, board, 0);
    if (rank == 1)
      throw RunError("cannot write (No space left on device), out/model.safetensors, free some space");
    wait_until(watch, [] { return false; });
  });
  EXPECT_EQ(job.wait(), (std::vector<int>{1, 1, 1}));
  EXPECT_EQ(
      job.err(),
      "train_gpt: error: rank 1: cannot write (No space left on device), out/model.safetensors, free some "
      "space\n");
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(Watch, RankZeroThrows) {
  Job job(3, patient(), [](Watch& watch, int rank, Board&) {
    if (rank == 0) throw UsageError("bad value, --steps, use a number");
    wait_until(watch, [] { return false; });
  });
  EXPECT_EQ(job.wait(), (std::vector<int>{2, 2, 2}));
  EXPECT_EQ(job.err(), "train_gpt: error: rank 0: bad value, --steps, use a number\n");
}

TEST(Watch, AllThrowTheSame) {
  Job job(4, patient(),
          [](Watch&, int, Board&) { throw UsageError("no such file,\n--train x, check the path"); });
  EXPECT_EQ(job.wait(), (std::vector<int>{2, 2, 2, 2}));
  EXPECT_EQ(job.err(), "train_gpt: error: no such file, --train x, check the path\n");
}

// ------------------------------------------------------------------------------------------------ hangs and
// stops
TEST(Watch, ARankThatHangsIsNamed) {
  WatchOptions options = patient();
  options.patience = 0.5;
  Job job(3, options, [](Watch& watch, int rank, Board& board) {
    for (int64_t step = 0; step < 3; ++step) exchange(watch, rank, 3, board, step);
    if (rank == 2) block();
    wait_until(watch, [] { return false; });
  });
  EXPECT_EQ(job.wait(), (std::vector<int>{1, 1, 1}));
  EXPECT_TRUE(std::regex_match(
      job.err(),
      std::regex(fmt::format(R"(train_gpt: error: rank 2 \({}, process \d+\) has not got on for [0-9.]+ s, )"
                             R"(in step 2, {}; a larger --patience waits longer\n)",
                             host_name(), kContinue))))
      << job.err();
}

std::string silent_line(const std::string& place) {
  return fmt::format(
      R"(train_gpt: error: {} has been silent for [0-9.]+ s, in step 0, look whether the process was )"
      R"(stopped or the machine is gone; {}\n)",
      place, kContinue);
}

TEST(Watch, AStoppedRankIsNamed) {
  WatchOptions options = patient();
  options.silence = 1;
  Job job(3, options, [](Watch& watch, int rank, Board& board) {
    exchange(watch, rank, 3, board, 0);
    board.go = true;
    wait_until(watch, [] { return false; });
  });
  while (!job.board().go) std::this_thread::yield();
  job.signal(1, SIGSTOP);
  job.wait_for(0);
  job.wait_for(2);
  job.signal(1, SIGCONT);  // it finds the end of the job in its mail
  EXPECT_EQ(job.wait(), (std::vector<int>{1, 1, 1}));
  EXPECT_TRUE(std::regex_match(job.err(), std::regex(silent_line(R"(rank 1 \(.*, process \d+\))"))))
      << job.err();
}

TEST(Watch, RankZeroIsStopped) {
  WatchOptions options = patient();
  options.silence = 1;
  Job job(3, options, [](Watch& watch, int rank, Board& board) {
    exchange(watch, rank, 3, board, 0);
    board.go = true;
    wait_until(watch, [] { return false; });
  });
  while (!job.board().go) std::this_thread::yield();
  job.signal(0, SIGSTOP);
  job.wait_for(1);
  job.wait_for(2);
  job.signal(0, SIGCONT);  // the others have given it up, and have said so
  EXPECT_EQ(job.wait(), (std::vector<int>{1, 1, 1}));
  EXPECT_TRUE(std::regex_match(job.err(), std::regex(silent_line(R"(rank 0 \(.*, process \d+\))"))))
      << job.err();
}

TEST(Watch, AJobThatIsStoppedAsAWholeGoesOn) {
  WatchOptions options = patient();
  options.silence = 0.5;
  Job job(3, options, [](Watch& watch, int rank, Board& board) {
    for (int64_t step = 0; step < 2; ++step) exchange(watch, rank, 3, board, step);
    if (rank == 0) board.go = true;
    wait_until(watch, [&] { return board.at[kMost - 1] == 1; });
  });
  while (!job.board().go) std::this_thread::yield();
  for (int rank = 0; rank < 3; ++rank) job.signal(rank, SIGSTOP);
  std::this_thread::sleep_for(std::chrono::milliseconds(700));
  for (int rank = 0; rank < 3; ++rank) job.signal(rank, SIGCONT);
  job.board().at[kMost - 1] = 1;
  EXPECT_EQ(job.wait(), (std::vector<int>{0, 0, 0}));
  EXPECT_EQ(job.err(), "");
}

// ---------------------------------------------------------------------------------------------------
// disagreement
TEST(Watch, OptionsDiffer) {
  Job job(4, patient(), [](Watch& watch, int rank, Board&) {
    watch.agree({{"--steps", "10"}, {"--batch-size", rank == 3 ? "8" : "4"}});
    throw std::logic_error("they agree");
  });
  EXPECT_EQ(job.wait(), (std::vector<int>{1, 1, 1, 1}));
  EXPECT_EQ(job.err(),
            "train_gpt: error: rank 3 has --batch-size 8 and rank 0 has 4, start all ranks with the same "
            "options, files "
            "and program\n");
}

TEST(Watch, ParametersDiffer) {
  Job job(3, patient(), [](Watch& watch, int rank, Board& board) {
    for (int64_t step = 0; step < 3; ++step) {
      exchange(watch, rank, 3, board, step);
      watch.compare(step, step == 1 && rank == 1 ? 18 : 17);
    }
    throw std::logic_error("they agree");
  });
  EXPECT_EQ(job.wait(), (std::vector<int>{1, 1, 1}));
  EXPECT_EQ(job.err(),
            fmt::format("train_gpt: error: the parameters of rank 1 differ from those of the other ranks "
                        "after step 1, {}; if it happens again, look for a faulty machine\n",
                        kContinue));
}

TEST(Watch, TheProgramHasOneFingerprint) {
  EXPECT_EQ(program_fingerprint(),
            fmt::format("{:016x}", hash_file(std::filesystem::read_symlink("/proc/self/exe"))));
}

// --------------------------------------------------------------------------------------------------------
// joining
/// What rank 0 answers to a stranger that says `text`; empty: it closes without a word.
std::string answer_to(const std::string& invitation, const std::string& text) {
  std::string why;
  Connection stranger = connect_to(nlohmann::json::parse(invitation).at("endpoint"), 10, true, why);
  if (write(stranger.socket(), text.data(), text.size()) < 0) return "cannot write";
  std::string answer;
  while (stranger.open()) {
    std::vector<pollfd> descriptors = {{stranger.socket(), POLLIN, 0}};
    wait_for(descriptors, 10);
    for (const auto& message : stranger.receive()) answer += message.dump();
  }
  return answer;
}

TEST(Watch, StrangersDoNotJoin) {
  const auto meddle = [](int rank, const std::string& text) {
    if (rank != 1) return text;
    nlohmann::json hello = {{"say", "hello"}, {"token", "guessed"},
                            {"rank", 1},      {"host", "h"},
                            {"process", 1},   {"endpoint", {{"addresses", {"h"}}, {"port", 1}}}};
    const auto require = [&](const std::string& what, const std::string& part) {
      const std::string answer = answer_to(text, what);
      if (answer.find(part) == std::string::npos || answer.empty() != part.empty())
        throw std::logic_error(what + " -> " + answer);
    };
    require(hello.dump() + "\n", "it belongs to another job");
    hello["token"] = nlohmann::json::parse(text)["token"];
    for (const int bad : {-1, 0, 2, 1000}) {
      hello["rank"] = bad;
      require(hello.dump() + "\n", "the job has fewer ranks");
    }
    require("{\"say\":\"hello\"}\n", "");
    require("GET / HTTP/1.1\r\n\r\n", "");
    require(std::string(200000, 'x'), "");
    return text;
  };
  Job job(
      2, patient(), [](Watch& watch, int, Board&) { watch.compare(0, 0); }, meddle);
  EXPECT_EQ(job.wait(), (std::vector<int>{0, 0}));
  EXPECT_EQ(job.err(), "");
}

TEST(Watch, AWrongTokenIsRefused) {
  WatchOptions options = patient();
  Job job(
      2, options, [](Watch&, int, Board&) {},
      [](int rank, const std::string& text) {
        nlohmann::json invitation = nlohmann::json::parse(text);
        if (rank == 0) return text;
        invitation["token"] = "another";
        return invitation.dump();
      });
  job.wait_for(1);
  job.signal(0, SIGKILL);  // it would wait for the true rank 1
  EXPECT_EQ(job.wait(), (std::vector<int>{128 + SIGKILL, 1}));
  EXPECT_EQ(job.err(),
            "train_gpt: error: rank 0 refuses rank 1, it belongs to another job, start all ranks of a job "
            "together\n");
}

TEST(Watch, ARankThatDoesNotCome) {
  WatchOptions options = patient();
  options.join = 0.5;
  Job job(
      3, options, [](Watch&, int, Board&) {},
      [](int rank, const std::string& text) {
        if (rank == 2) _exit(0);
        return text;
      });
  EXPECT_EQ(job.wait(), (std::vector<int>{1, 1, 0}));
  EXPECT_EQ(job.err(),
            fmt::format("train_gpt: error: rank 2 of 3 did not come within 0.5 s, look whether they were "
                        "started and reach {}\n",
                        host_name()));
}

TEST(Watch, NobodyListens) {
  const int port = Listener().port();  // free again
  const auto broadcast = [&](const std::string&) {
    return nlohmann::json{{"endpoint", {{"addresses", {"127.0.0.1", "::1"}}, {"port", port}}}, {"token", "t"}}
        .dump();
  };
  WatchOptions options = patient();
  options.join = 0.2;
  expect_error<RunError>([&] { Watch(1, 2, broadcast, options); },
                         {"rank 1 cannot reach rank 0 (Connection refused), 127.0.0.1 port"});
  expect_error<RunError>(
      [&] {
        Watch(
            1, 2, [](const std::string&) { return ""; }, options);
      },
      {"did not say where"});
}

TEST(Watch, BothKindsOfAddresses) {
  const Listener listener;
  for (const char* address : {"127.0.0.1", "::1", "localhost"}) {
    std::string why;
    const Connection connection = connect_to({{address}, listener.port()}, 10, false, why);
    if (why == "Cannot assign requested address") continue;  // a machine without IPv6
    EXPECT_TRUE(connection.open()) << address << ": " << why;
  }
}

// -------------------------------------------------------------------------------------- ranks as threads of
// one process
/// Runs `work` on a Watch per rank, each in a thread.
void with_ranks(int ranks, const std::function<void(Watch& watch, int rank)>& work) {
  std::promise<std::string> invitation;
  const std::shared_future<std::string> invited = invitation.get_future();
  const auto broadcast = [&](const std::string& text) {
    if (!text.empty()) invitation.set_value(text);
    return invited.get();
  };
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank)
    threads.emplace_back([&, rank] {
      Watch watch(rank, ranks, broadcast, patient());
      work(watch, rank);
    });
  for (std::thread& thread : threads) thread.join();
}

/// Ranks that run at random paces, up to two steps apart, with a request to stop at a random moment on some.
void stop_somewhere(int ranks, unsigned seed) {
  std::array<std::atomic<int64_t>, kMost> started, stopped;
  for (auto& step : started) step = -1;
  std::mt19937 draw(seed);
  const auto requester = static_cast<int>(draw() % static_cast<unsigned>(ranks));
  const bool all = draw() % 3 == 0;
  const int64_t when = static_cast<int64_t>(draw() % 50);
  with_ranks(ranks, [&](Watch& watch, int rank) {
    std::mt19937 random(seed * 100 + static_cast<unsigned>(rank));
    const auto is_behind = [&](const auto& other, int64_t step) { return other < step - 2; };
    int64_t step = 0;
    while (true) {
      if (step >= when && (rank == requester || all)) watch.request_stop();
      if (!watch.start_step(step)) break;
      started[static_cast<size_t>(rank)] = step;
      while (std::any_of(started.begin(), started.begin() + ranks,
                         [&](const auto& s) { return is_behind(s, step); }))
        std::this_thread::yield();
      for (unsigned i = random() % 4; i > 0; --i) std::this_thread::yield();
      ++step;
    }
    EXPECT_EQ(watch.stop_step(), step);
    stopped[static_cast<size_t>(rank)] = step;
  });
  for (int rank = 0; rank < ranks; ++rank) {
    EXPECT_EQ(stopped[static_cast<size_t>(rank)], stopped[0]) << "rank " << rank << ", seed " << seed;
    EXPECT_EQ(started[static_cast<size_t>(rank)], stopped[0] - 1) << "rank " << rank << ", seed " << seed;
  }
}

TEST(Watch, AllRanksStopAfterTheSameStep) {
  for (unsigned seed = 0; seed < 60; ++seed) stop_somewhere(2 + static_cast<int>(seed % 4), seed);
}

TEST(Watch, ManyRanks) {
  with_ranks(100, [](Watch& watch, int rank) {
    watch.agree({{"--steps", "3"}});
    int64_t step = 0;
    for (; watch.start_step(step); ++step) {
      watch.compare(step, 17);
      if (rank == 57 && step == 2) watch.request_stop();
    }
    EXPECT_EQ(watch.stop_step(), step);
    EXPECT_GE(step, 3);
  });
}

TEST(Watch, ARequestBeforeTheFirstStep) {
  with_ranks(3, [](Watch& watch, int rank) {
    if (rank == 1) watch.request_stop();
    watch.agree({});
    while (watch.stop_step() < 0) std::this_thread::yield();
    EXPECT_FALSE(watch.start_step(500));  // of a run that was resumed
  });
}

TEST(Watch, TheSlowRankIsNamed) {
  std::atomic<bool> named = false;
  with_ranks(3, [&](Watch& watch, int rank) {
    for (int64_t step = 0; step < 5; ++step) {
      EXPECT_TRUE(watch.start_step(step));
      watch.worked(rank == 2 ? 0.5 : 0.2);
    }
    const std::string line =
        fmt::format("rank 2 ({}): 0.5 s of own work per step, the median is 0.2 s", host_name());
    while (rank == 0 && watch.slow_rank() != line) std::this_thread::yield();
    if (rank == 0) {
      named = true;
      ASSERT_EQ(watch.paces().size(), 3U);
    }
    while (!named) std::this_thread::yield();
    if (rank > 0) {
      EXPECT_EQ(watch.slow_rank(), "");
    }
  });
}
}  // namespace
