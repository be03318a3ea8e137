// Jobs of several processes in which something goes wrong, and every line that they print about it.
#include "world/watch.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <chrono>
#include <csignal>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "error.h"
#include "files.h"
#include "interrupt.h"
#include "tests/temporary_folder.h"
#include "tests/watch_job.h"

namespace {
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

TEST(Watch, ASignalToOneRankStopsAll) {
  Job job(3, patient(), [](Watch& watch, int rank, Board& board) {
    const InterruptGuard interrupt;
    int64_t step = 0;
    while (true) {
      if (interrupt.requested()) watch.request_stop();
      if (!watch.start_step(step)) break;
      meet(watch, rank, 3, board, step);
      ++step;
    }
    if (watch.stop_step() != step) throw std::logic_error("stopped elsewhere");
  });
  while (job.board().at[2] < 5) std::this_thread::yield();
  job.signal(1, SIGTERM);
  EXPECT_EQ(job.wait(), (std::vector<int>{0, 0, 0}));
  EXPECT_EQ(job.err(), "");
  for (size_t rank = 1; rank < 3; ++rank) EXPECT_EQ(job.board().at[rank], job.board().at[0]);
}

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

/// One line: `begin`, a number of seconds, `end`.
void expect_line(const std::string& err, const std::string& begin, const std::string& end) {
  const std::string line = fmt::format("train_gpt: error: {}", begin), rest = fmt::format(" s{}\n", end);
  ASSERT_GT(err.size(), line.size() + rest.size()) << err;
  EXPECT_TRUE(err.starts_with(line)) << err;
  EXPECT_TRUE(err.ends_with(rest)) << err;
  const std::string number = err.substr(line.size(), err.size() - line.size() - rest.size());
  EXPECT_EQ(number.find_first_not_of("0123456789."), std::string::npos) << err;
}

TEST(Watch, ARankThatHangsIsNamed) {
  WatchOptions options = patient();
  options.patience = 0.5;
  Job job(3, options, [](Watch& watch, int rank, Board& board) {
    for (int64_t step = 0; step < 3; ++step) exchange(watch, rank, 3, board, step);
    if (rank == 2) block();
    wait_until(watch, [] { return false; });
  });
  EXPECT_EQ(job.wait(), (std::vector<int>{1, 1, 1}));
  expect_line(job.err(), job.who(2) + " has not got on for ",
              fmt::format(", in step 2, {}; a larger --patience waits longer", kContinue));
}

const std::string kSilent =
    ", in step 0, look whether the process was stopped or the machine is gone; " + kContinue;

/// Stops a rank until the others have given it up, and lets it find the end of the job in its mail.
void expect_stopped_rank_is_named(int stopped) {
  WatchOptions options = patient();
  options.silence = 1;
  Job job(3, options, [](Watch& watch, int rank, Board& board) {
    exchange(watch, rank, 3, board, 0);
    board.go = true;
    wait_until(watch, [] { return false; });
  });
  while (!job.board().go) std::this_thread::yield();
  job.signal(stopped, SIGSTOP);
  for (const int rank : {0, 1, 2})
    if (rank != stopped) job.wait_for(rank);
  job.signal(stopped, SIGCONT);
  EXPECT_EQ(job.wait(), (std::vector<int>{1, 1, 1}));
  expect_line(job.err(), job.who(stopped) + " has been silent for ", kSilent);
}

TEST(Watch, AStoppedRankIsNamed) {
  expect_stopped_rank_is_named(1);
}

TEST(Watch, RankZeroIsStopped) {
  expect_stopped_rank_is_named(0);
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

}  // namespace
