// How ranks find each other, who is kept out, and how they stop together.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <functional>
#include <future>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "error.h"
#include "json_text.h"
#include "tests/temporary_folder.h"
#include "tests/watch_job.h"
#include "world/watch.h"
#include "world/watch_socket.h"

namespace {
TEST(WatchRanks, Alone) {
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

/// What rank 0 answers to a stranger that says `text`; empty: it closes without a word.
std::string answer_to(const std::string& invitation, const std::string& text) {
  std::string why;
  Connection stranger = connect_to(require_json(invitation).at("endpoint"), 10, true, why);
  if (write(stranger.socket(), text.data(), text.size()) < 0) return "cannot write";
  std::string answer;
  while (stranger.open()) {
    std::vector<pollfd> descriptors = {{stranger.socket(), POLLIN, 0}};
    wait_for(descriptors, 10);
    for (const auto& message : stranger.receive()) answer += json_text(message);
  }
  return answer;
}

TEST(WatchRanks, StrangersDoNotJoin) {
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
    require(json_text(hello) + "\n", "it belongs to another job");
    hello["token"] = require_json(text)["token"];
    for (const int bad : {-1, 0, 2, 1000}) {
      hello["rank"] = bad;
      require(json_text(hello) + "\n", "the job has fewer ranks");
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

TEST(WatchRanks, AWrongTokenIsRefused) {
  WatchOptions options = patient();
  Job job(
      2, options, [](Watch&, int, Board&) {},
      [](int rank, const std::string& text) {
        nlohmann::json invitation = require_json(text);
        if (rank == 0) return text;
        invitation["token"] = "another";
        return json_text(invitation);
      });
  job.wait_for(1);
  job.signal(0, SIGKILL);  // it would wait for the true rank 1
  EXPECT_EQ(job.wait(), (std::vector<int>{128 + SIGKILL, 1}));
  EXPECT_EQ(job.err(),
            "train_gpt: error: rank 0 refuses rank 1, it belongs to another job, start all ranks of a job "
            "together\n");
}

TEST(WatchRanks, ARankThatDoesNotCome) {
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

TEST(WatchRanks, NobodyListens) {
  const int port = Listener().port();  // free again
  const auto broadcast = [&](const std::string&) {
    return json_text(
        nlohmann::json{{"endpoint", {{"addresses", {"127.0.0.1", "::1"}}, {"port", port}}}, {"token", "t"}});
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

TEST(WatchRanks, BothKindsOfAddresses) {
  const Listener listener;
  for (const char* address : {"127.0.0.1", "::1", "localhost"}) {
    std::string why;
    const Connection connection = connect_to({{address}, listener.port()}, 10, false, why);
    if (why == "Cannot assign requested address") continue;  // a machine without IPv6
    EXPECT_TRUE(connection.open()) << address << ": " << why;
  }
}

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

TEST(WatchRanks, AllRanksStopAfterTheSameStep) {
  for (unsigned seed = 0; seed < 60; ++seed) stop_somewhere(2 + static_cast<int>(seed % 4), seed);
}

TEST(WatchRanks, ManyRanks) {
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

TEST(WatchRanks, ARequestBeforeTheFirstStep) {
  with_ranks(3, [](Watch& watch, int rank) {
    if (rank == 1) watch.request_stop();
    watch.agree({});
    while (watch.stop_step() < 0) std::this_thread::yield();
    EXPECT_FALSE(watch.start_step(500));  // of a run that was resumed
  });
}

TEST(WatchRanks, TheSlowRankIsNamed) {
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
