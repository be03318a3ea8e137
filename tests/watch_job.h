// Jobs of several processes with a Watch each, forked from a test, and all that they print.
#pragma once

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
#include <string>
#include <thread>
#include <vector>

#include "error.h"
#include "tests/temporary_folder.h"
#include "world/watch.h"
#include "world/watch_socket.h"

constexpr int kMost = 8;  // ranks

/// Where the processes of a job meet, in memory that they share.
struct Board {
  std::array<std::atomic<int64_t>, kMost> at;  // the step that a rank is in
  std::atomic<bool> go;
};

/// Nothing here ends a job early unless the test wants it: the machine may be slow.
inline WatchOptions patient() {
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
inline void wait_until(Watch& watch, const std::function<bool()>& condition) {
  while (!condition()) {
    watch.check();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

/// Waits for all to be in a step, as an exchange of gradients would.
inline void meet(Watch& watch, int rank, int ranks, Board& board, int64_t step) {
  board.at[static_cast<size_t>(rank)] = step;
  wait_until(watch, [&] {
    return std::all_of(board.at.begin(), board.at.begin() + ranks,
                       [&](const auto& at) { return at >= step; });
  });
}

/// A step of a job that nobody asks to stop.
inline void exchange(Watch& watch, int rank, int ranks, Board& board, int64_t step) {
  if (!watch.start_step(step)) throw std::logic_error("nobody asked to stop");
  meet(watch, rank, ranks, board, step);
}

/// A main thread that is blocked where nothing reaches it.
[[noreturn]] inline void block() {
  while (true) pause();
}

inline const std::string kContinue = "continue with --resume from the last checkpoint";
