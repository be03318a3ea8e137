// What rank 0 concludes from what it hears, at times that the tests make up.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "world/watch_judge.h"

namespace {
/// A job of ranks that have joined at time 0, on hosts h0, h1, ..., as processes 100, 101, ...
class Court {
 public:
  explicit Court(int ranks, const WatchOptions& options = {}) : ranks_(ranks), judge(ranks, options, 0) {
    for (int rank = 0; rank < ranks; ++rank) join(rank);
  }
  void join(int rank) { judge.joined({rank, "h" + std::to_string(rank), 100 + rank}, 0); }
  /// All ranks say the same.
  void all(const Beat& beat, double now) {
    for (int rank = 0; rank < ranks_; ++rank) judge.beat(rank, beat, now);
  }
  std::string line() const { return judge.verdict() ? judge.verdict()->line : "(none)"; }
  int status() const { return judge.verdict() ? judge.verdict()->status : 0; }

 private:
  int ranks_;

 public:
  Judge judge;
};

Beat at(int64_t step, double quiet = 0, bool waiting = false) {
  return {.step = step, .waiting = waiting, .quiet = quiet, .longest = 0.1};
}

const std::string kContinue = "continue with --resume from the last checkpoint";
const std::string kPatience = kContinue + "; a larger --patience waits longer";

TEST(WatchJudge, ALostRankIsNamedWithWhatItDid) {
  Court court(3);
  court.all(at(17), 1);
  court.judge.lost({2}, 1.5);
  EXPECT_EQ(court.line(), "rank 2 (h2, process 102) ended without a word, in step 17, " + kContinue);
  EXPECT_EQ(court.status(), 1);
  court.judge.lost({1}, 1.6);  // a consequence
  EXPECT_TRUE(court.line().starts_with("rank 2 "));

  Court busy(3);
  busy.judge.beat(1, {.step = 4, .activity = "writing a checkpoint"}, 1);
  busy.judge.lost({1}, 1.5);
  EXPECT_EQ(busy.line(),
            "rank 1 (h1, process 101) ended without a word, in step 4, writing a checkpoint, " + kContinue);

  Court machine(8);
  machine.judge.lost({4, 5, 6, 7}, 1.5);
  EXPECT_EQ(machine.line(), "ranks 4-7 ended without a word, before the first step, " + kContinue);
}

TEST(WatchJudge, AGoodbyeIsNoLoss) {
  Court court(3);
  court.judge.left(2);
  court.judge.lost({2}, 1);
  EXPECT_EQ(court.line(), "(none)");
  court.judge.lost({1, 2}, 1);
  EXPECT_TRUE(court.line().starts_with("rank 1 (h1")) << court.line();
}

TEST(WatchJudge, OneRankThrows) {
  Court court(3, {.grace = 1});
  court.all(at(3), 10);
  court.judge.failed(1, "no space,\nout/log.jsonl, free some\n", 1, 10);
  court.judge.tick(10.9);
  EXPECT_EQ(court.line(), "(none)");  // others may throw the same
  court.judge.tick(11);
  EXPECT_EQ(court.line(), "rank 1: no space, out/log.jsonl, free some");
  EXPECT_EQ(court.status(), 1);
}

TEST(WatchJudge, AllThrowTheSame) {
  Court court(3);
  for (const int rank : {1, 0, 2}) {
    EXPECT_EQ(court.line(), "(none)");
    court.judge.failed(rank, "no such file, --train x, check", 2, 10);
  }
  EXPECT_EQ(court.line(), "no such file, --train x, check");
  EXPECT_EQ(court.status(), 2);
}

TEST(WatchJudge, SomeThrowTheSame) {
  Court court(5);
  for (const int rank : {4, 2, 3}) court.judge.failed(rank, "no such file", 1, 10);
  court.judge.failed(0, "a consequence", 2, 10.1);
  court.judge.failed(1, "another", 2, 10.1);
  EXPECT_EQ(court.line(), "ranks 2-4: no such file");  // the first message counts
  EXPECT_EQ(court.status(), 1);
}

TEST(WatchJudge, ADeathExplainsExceptionsOfOthers) {
  Court court(3);
  court.judge.failed(1, "connection reset by rank 2", 1, 10);
  court.judge.lost({2}, 10.1);
  EXPECT_TRUE(court.line().starts_with("rank 2 (h2, process 102) ended")) << court.line();
}

TEST(WatchJudge, MessagesAreOneShortLine) {
  EXPECT_EQ(one_line("a\nb\r\n"), "a b ");
  const std::string fits(499, 'x');
  EXPECT_EQ(one_line(fits), fits);
  EXPECT_EQ(one_line(fmt::format("{}\u00e9{}", fits, fits)),
            fmt::format("{}...", fits));  // not half a letter
}

TEST(WatchJudge, ARankThatDoesNotGetOn) {
  Court court(3, {.patience = 60});
  court.all(at(17, 59, true), 100);
  court.judge.beat(2, at(17, 59), 100);
  court.judge.tick(100);
  EXPECT_EQ(court.line(), "(none)");
  court.judge.beat(2, at(17, 60), 101);
  court.judge.tick(101);
  EXPECT_EQ(court.line(), "rank 2 (h2, process 102) has not got on for 60 s, in step 17, " + kPatience);
}

TEST(WatchJudge, LongWorkGetsTenTimesThePatience) {
  Court court(2, {.patience = 60});
  Beat writing = at(17, 599);
  writing.activity = "writing a checkpoint";
  court.judge.beat(0, writing, 700);
  court.judge.beat(1, at(17, 599, true), 700);
  court.judge.tick(700);
  EXPECT_EQ(court.line(), "(none)");
  writing.quiet = 600;
  court.judge.beat(0, writing, 701);
  court.judge.tick(701);
  EXPECT_EQ(
      court.line(),
      "rank 0 (h0, process 100) has not got on for 600 s, in step 17, writing a checkpoint, " + kPatience);
}

TEST(WatchJudge, SlowStepsAndTheFirstOneGetMoreTime) {
  Court court(2, {.patience = 60});
  Beat slow = at(17, 399);
  slow.longest = 100;
  court.all(slow, 1000);
  court.judge.tick(1000);
  EXPECT_EQ(court.line(), "(none)");  // four times the longest
  Beat first = at(0, 599);
  first.longest = 0;
  court.all(first, 1000);
  court.judge.tick(1000);
  EXPECT_EQ(court.line(), "(none)");
  slow.quiet = 400;
  court.judge.beat(0, at(17, 10), 1001);
  court.judge.beat(1, slow, 1001);
  court.judge.tick(1001);
  EXPECT_TRUE(court.line().starts_with("rank 1 (h1, process 101) has not got on for 400 s")) << court.line();
}

TEST(WatchJudge, AllWaitForOthers) {
  Court court(4, {.patience = 60});
  court.all(at(17, 70, true), 100);
  court.judge.beat(2, at(16, 80, true), 100);
  court.judge.beat(3, at(16, 59, true), 100);
  court.judge.tick(100);
  EXPECT_EQ(court.line(), "(none)");
  court.judge.beat(3, at(16, 60, true), 101);
  court.judge.tick(101);
  EXPECT_EQ(court.line(),
            "no rank has got on for 60 s, ranks 2-3 in step 16; ranks 0-1 in step 17, " + kPatience);
}

TEST(WatchJudge, AllAreBlockedWhereNobodySeesWhy) {
  Court court(3, {.patience = 60, .beat = 1});
  court.all(at(17, 59), 100);
  court.judge.beat(0, at(17, 60), 100);
  court.judge.tick(100);
  EXPECT_EQ(court.line(), "no rank has got on for 59 s, ranks 0-2 in step 17, " + kPatience);

  Court last(3, {.patience = 60, .beat = 1});
  last.all(at(17, 60), 100);
  last.judge.left(0);
  last.judge.left(2);
  last.judge.tick(100);
  EXPECT_EQ(last.line(), "rank 1 (h1, process 101) has not got on for 60 s, in step 17, " + kPatience);
}

TEST(WatchJudge, SilenceIsNoticed) {
  Court court(3, {.silence = 10});
  court.all(at(5), 20);
  court.judge.beat(0, at(6), 29);
  court.judge.beat(2, at(6), 29);
  court.judge.tick(29.9);
  EXPECT_EQ(court.line(), "(none)");
  court.judge.tick(30);
  EXPECT_EQ(
      court.line(),
      "rank 1 (h1, process 101) has been silent for 10 s, in step 6, look whether the process was stopped or "
      "the machine is gone; " +
          kContinue);
}

TEST(WatchJudge, ItsOwnStopIsNobodysFault) {
  Court court(2, {.silence = 10});
  court.all(at(5), 20);
  court.judge.was_stopped(100, 120);  // a job that was stopped and continued as a whole
  court.judge.tick(121);
  EXPECT_EQ(court.line(), "(none)");
  court.judge.tick(131);
  EXPECT_TRUE(court.line().starts_with("rank 0 (h0, process 100) has been silent")) << court.line();

  Court alone(2, {.silence = 10});
  alone.judge.was_stopped(100, 120);  // rank 0 alone: the others have said that, and ended
  alone.judge.lost({1}, 121);
  EXPECT_EQ(alone.line(), "");
  EXPECT_EQ(alone.status(), 1);

  Court later(2, {.silence = 10});
  later.judge.was_stopped(100, 120);
  later.judge.lost({1}, 130);  // has nothing to do with it
  EXPECT_TRUE(later.line().starts_with("rank 1 (h1, process 101) ended")) << later.line();
}

TEST(WatchJudge, WhoDoesNotCome) {
  Judge judge(6, {.join = 60}, 0);
  for (const int rank : {0, 1, 4}) judge.joined({rank, "h" + std::to_string(rank), 100 + rank}, 1);
  judge.tick(59);
  EXPECT_FALSE(judge.verdict());
  judge.tick(60);
  ASSERT_TRUE(judge.verdict());
  EXPECT_EQ(judge.verdict()->line,
            "ranks 2-3, 5 of 6 did not come within 60 s, look whether they were started and reach h0");
}

/// The line when rank r's facts are facts[r].
std::string line_of_facts(const std::vector<Watch::Facts>& facts) {
  Court court(static_cast<int>(facts.size()));
  bool agreed = false;
  for (size_t rank = 0; rank < facts.size(); ++rank) {
    EXPECT_FALSE(agreed);
    agreed = court.judge.answered(static_cast<int>(rank), {-1, facts[rank]});
  }
  EXPECT_EQ(agreed, !court.judge.verdict());
  return court.line();
}

TEST(WatchJudge, FactsThatDiffer) {
  const std::string advice = ", start all ranks with the same options, files and program";
  const Watch::Facts facts = {{"--batch-size", "4"}, {"the data", "abc"}, {"--init", ""}};
  EXPECT_EQ(line_of_facts({facts, facts, facts}), "(none)");
  Watch::Facts other = facts;
  other[0].second = "8";
  EXPECT_EQ(line_of_facts({facts, facts, facts, other}),
            "rank 3 has --batch-size 8 and rank 0 has 4" + advice);
  EXPECT_EQ(line_of_facts({other, facts, facts}), "ranks 1-2 have --batch-size 4 and rank 0 has 8" + advice);
  Watch::Facts third = other;
  third[0].second = "16";
  EXPECT_EQ(line_of_facts({facts, other, third}), "rank 1 has --batch-size 8 and rank 0 has 4" + advice);
  Watch::Facts file = facts;
  file[1].second = "abd";
  EXPECT_EQ(line_of_facts({facts, file}), "rank 1 has the data abd and rank 0 has abc" + advice);
  Watch::Facts init = facts;
  init[2].second = "x";
  EXPECT_EQ(line_of_facts({facts, init}), "rank 1 has --init x and rank 0 has nothing" + advice);
  Watch::Facts more = facts;
  more.emplace_back("--new", "1");
  EXPECT_EQ(line_of_facts({facts, more}), "rank 1 has --new 1 and rank 0 has none" + advice);
  EXPECT_EQ(line_of_facts({more, facts}), "rank 1 has --new none and rank 0 has 1" + advice);
}

std::string line_of_checksums(const std::vector<std::pair<int64_t, std::string>>& sums) {
  Court court(static_cast<int>(sums.size()));
  bool agreed = false;
  for (size_t rank = 0; rank < sums.size(); ++rank)
    agreed =
        court.judge.answered(static_cast<int>(rank), {sums[rank].first, {{"checksum", sums[rank].second}}});
  EXPECT_EQ(agreed, !court.judge.verdict());
  return court.line();
}

TEST(WatchJudge, ChecksumsThatDiffer) {
  const std::string advice =
      " after step 500, " + kContinue + "; if it happens again, look for a faulty machine";
  EXPECT_EQ(line_of_checksums({{500, "a"}, {500, "a"}}), "(none)");
  EXPECT_EQ(line_of_checksums({{500, "a"}, {500, "a"}, {500, "b"}, {500, "a"}}),
            "the parameters of rank 2 differ from those of the other ranks" + advice);
  EXPECT_EQ(line_of_checksums({{500, "b"}, {500, "a"}, {500, "c"}, {500, "a"}, {500, "a"}}),
            "the parameters of ranks 0, 2 differ from those of the other ranks" + advice);
  EXPECT_EQ(line_of_checksums({{500, "b"}, {500, "a"}}), "the parameters of ranks 0-1 differ" + advice);
  EXPECT_EQ(line_of_checksums({{500, "a"}, {400, "a"}}),
            "rank 1 compares after step 400 and rank 0 after step 500, " + kContinue);
}

TEST(WatchJudge, RoundsFollowEachOther) {
  Court court(2);
  for (int64_t step = 0; step < 3; ++step) {
    EXPECT_FALSE(court.judge.answered(0, {step, {{"checksum", std::to_string(step)}}}));
    EXPECT_TRUE(court.judge.answered(1, {step, {{"checksum", std::to_string(step)}}}));
  }
}

TEST(WatchJudge, SlowRanksOfLateReports) {
  Court court(3);
  // Rank 2 is slow at first, then rank 1.
  for (int beat = 0; beat <= 40; ++beat) {
    const double late = beat <= 20 ? 0 : beat - 20;
    for (int rank = 0; rank < 3; ++rank) {
      Beat pace = at(10 * beat);
      pace.worked = 10 * beat;
      pace.work = 10 * (0.2 * beat + (rank == 2 ? 0.1 * (beat - late) : 0) + (rank == 1 ? 0.2 * late : 0));
      court.judge.beat(rank, pace, beat);
    }
    if (beat == 20) {
      EXPECT_EQ(slowest(court.judge.paces()), "rank 2 (h2): 0.3 s of own work per step, the median is 0.2 s");
    }
  }
  EXPECT_EQ(slowest(court.judge.paces()), "rank 1 (h1): 0.4 s of own work per step, the median is 0.2 s");
  EXPECT_EQ(court.judge.paces()[1].step, 400);
  EXPECT_EQ(slowest({{0, "a", 1, 1.0}, {1, "b", 1, 1.3}}), "");
  EXPECT_EQ(slowest({{0, "a", 1, 1.0}, {1, "b", 1, 1.4}}),
            "rank 1 (b): 1.4 s of own work per step, the median is 1 s");
  EXPECT_EQ(slowest({{0, "a", -1, 0}, {1, "b", -1, 0}}), "");
  EXPECT_EQ(slowest({}), "");
}
}  // namespace
