// What launchers say in the environment, and ranks that meet over TCP.
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <map>
#include <thread>

#include "error.h"
#include "tests/free_port.h"
#include "world/rendezvous.h"
#include "world/world.h"

namespace {
using Variables = std::map<std::string, std::string>;

ProcessLaunch find(const Variables& variables) {
  return find_launch([&](const char* name) {
    const auto found = variables.find(name);
    return found == variables.end() ? nullptr : found->second.c_str();
  });
}

/// What find() says is wrong; empty when nothing is.
std::string complaint(const Variables& variables) {
  try {
    find(variables);
  } catch (const UsageError& error) {
    return error.what();
  }
  return "";
}
void expect_complaint(const Variables& variables, const std::string& variable) {
  const std::string text = complaint(variables);
  EXPECT_NE(text.find(variable), std::string::npos) << "'" << text << "' does not name " << variable;
}

const Variables kOpenMpi = {
    {"OMPI_COMM_WORLD_RANK", "5"}, {"OMPI_COMM_WORLD_SIZE", "8"}, {"OMPI_COMM_WORLD_LOCAL_RANK", "1"}};
const Variables kTorchrun = {{"RANK", "3"},
                             {"WORLD_SIZE", "4"},
                             {"LOCAL_RANK", "1"},
                             {"MASTER_ADDR", "10.0.0.1"},
                             {"MASTER_PORT", "4321"}};
const Variables kSrun = {
    {"SLURM_PROCID", "2"}, {"SLURM_NTASKS", "4"}, {"SLURM_LOCALID", "0"}, {"SLURM_STEP_ID", "0"}};

Variables operator+(Variables a, const Variables& b) {
  for (const auto& [name, value] : b) a[name] = value;
  return a;
}
}  // namespace

TEST(World, WithoutALauncherThereIsOneProcess) {
  const ProcessLaunch launch = find({});
  EXPECT_EQ(launch.by, ProcessLaunch::By::hand);
  EXPECT_EQ(launch.rank, 0);
  EXPECT_EQ(launch.size, 1);
}

TEST(World, EveryLauncherIsUnderstood) {
  struct Case {
    Variables variables;
    ProcessLaunch::By by;
    int rank, size, local_rank;
  };
  for (const Case& c :
       {Case{kOpenMpi, ProcessLaunch::By::openmpi, 5, 8, 1},
        Case{{{"PMI_RANK", "0"}, {"PMI_SIZE", "2"}}, ProcessLaunch::By::pmi, 0, 2, -1},
        Case{kSrun, ProcessLaunch::By::slurm, 2, 4, 0}, Case{kTorchrun, ProcessLaunch::By::ranks, 3, 4, 1},
        Case{{{"RANK", "0"}, {"WORLD_SIZE", "1"}}, ProcessLaunch::By::ranks, 0, 1, -1}}) {
    const ProcessLaunch launch = find(c.variables);
    EXPECT_EQ(launch.by, c.by);
    EXPECT_EQ(launch.rank, c.rank);
    EXPECT_EQ(launch.size, c.size);
    EXPECT_EQ(launch.local_rank, c.local_rank);
  }
  EXPECT_EQ(find(kTorchrun).address, "10.0.0.1");
  EXPECT_EQ(find(kTorchrun).port, 4321);
  EXPECT_EQ(find(kTorchrun + Variables{{"TORCHELASTIC_USE_AGENT_STORE", "True"}}).port, 4322);
  EXPECT_EQ(find(kOpenMpi).address, "");
}

TEST(World, SlurmCountsOnlyInAStepOfSrun) {
  Variables batch = kSrun;
  batch.erase("SLURM_STEP_ID");
  EXPECT_EQ(find(batch).size, 1);
  EXPECT_EQ(find(kSrun + Variables{{"SLURM_STEP_ID", "4294967290"}}).size, 1) << "a shell of salloc";
  // What mpirun or torchrun starts below srun sees the numbers of the step too.
  EXPECT_EQ(find(kSrun + kOpenMpi).rank, 5);
  EXPECT_EQ(find(kSrun + kTorchrun).rank, 3);
}

TEST(World, WhatMakesNoSenseIsRefusedByName) {
  for (const char* text : {"", "x", "1x", "-1", "8", "99999999999999999999", "1.5"})
    expect_complaint(kOpenMpi + Variables{{"OMPI_COMM_WORLD_RANK", text}}, "OMPI_COMM_WORLD_RANK");
  expect_complaint(kOpenMpi + Variables{{"OMPI_COMM_WORLD_SIZE", "0"}}, "OMPI_COMM_WORLD_SIZE");
  expect_complaint(kOpenMpi + Variables{{"OMPI_COMM_WORLD_LOCAL_RANK", "8"}}, "OMPI_COMM_WORLD_LOCAL_RANK");
  expect_complaint(kTorchrun + Variables{{"MASTER_PORT", "65536"}}, "MASTER_PORT");
  expect_complaint(kSrun + Variables{{"SLURM_NTASKS", "many"}}, "SLURM_NTASKS");
}

TEST(World, HalfAPairIsRefusedByName) {
  for (const auto& [set, missing] : {std::pair{"RANK", "WORLD_SIZE"}, std::pair{"WORLD_SIZE", "RANK"},
                                     std::pair{"PMI_SIZE", "PMI_RANK"}}) {
    expect_complaint({{set, "2"}}, set);
    expect_complaint({{set, "2"}}, missing);
  }
  Variables lost = kTorchrun;
  lost.erase("MASTER_ADDR");
  expect_complaint(lost, "MASTER_ADDR");
}

TEST(World, LaunchersMustNotContradictEachOther) {
  expect_complaint(kOpenMpi + kTorchrun, "OMPI_COMM_WORLD_SIZE");
  expect_complaint(kOpenMpi + kTorchrun, "WORLD_SIZE");
  const Variables same = kOpenMpi + Variables{{"RANK", "5"}, {"WORLD_SIZE", "8"}};
  EXPECT_EQ(find(same).by, ProcessLaunch::By::openmpi);
}

namespace {
/// A connection to a port of this machine once somebody listens there.
int call(int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  for (;;) {
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0) return fd;
    close(fd);
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
}

constexpr double kPatience = 60;  // seconds; only a failure takes so long
}  // namespace

TEST(Rendezvous, RanksHearEachOtherAgainAndAgain) {
  constexpr int kRanks = 5;
  const int port = free_port();
  std::vector<std::vector<std::string>> heard(kRanks), heard_then(kRanks);
  std::vector<std::string> from_zero(kRanks);
  std::vector<std::thread> ranks;
  for (size_t r = 0; r < kRanks; ++r)
    ranks.emplace_back([&, r] {
      Rendezvous meeting(static_cast<int>(r), kRanks, "localhost", port, kPatience);
      heard[r] = meeting.gather("rank " + std::to_string(r));
      from_zero[r] = meeting.broadcast(std::string(128, static_cast<char>(r)));
      heard_then[r] = meeting.gather(std::string(100000 * r, 'x'));
    });
  for (std::thread& rank : ranks) rank.join();
  for (size_t r = 0; r < kRanks; ++r) {
    ASSERT_EQ(heard[r].size(), size_t{kRanks});
    EXPECT_EQ(from_zero[r], std::string(128, '\0'));
    for (size_t of = 0; of < kRanks; ++of) {
      EXPECT_EQ(heard[r][of], "rank " + std::to_string(of));
      EXPECT_EQ(heard_then[r][of].size(), 100000 * of);
    }
  }
}

TEST(Rendezvous, StrangersAreSentAway) {
  const int port = free_port();
  std::vector<std::string> heard;
  std::thread zero([&] { heard = Rendezvous(0, 2, "", port, kPatience).gather("zero"); });
  const int silent = call(port);
  const int noisy = call(port);
  ASSERT_GT(send(noisy, "GET / HTTP/1.1\r\n\r\n", 18, MSG_NOSIGNAL), 0);
  close(silent);
  Rendezvous(1, 2, "127.0.0.1", port, kPatience).gather("one");
  zero.join();
  close(noisy);
  EXPECT_EQ(heard, (std::vector<std::string>{"zero", "one"}));
}

namespace {
/// What went wrong for the rank; empty when nothing did.
std::string failure_of(int rank, int size, int port, double patience) {
  try {
    Rendezvous meeting(rank, size, "localhost", port, patience);
    meeting.gather("");
  } catch (const RunError& error) {
    return error.what();
  }
  return "";
}
}  // namespace

TEST(Rendezvous, RanksThatDoNotComeAreNamed) {
  EXPECT_NE(
      failure_of(0, 3, free_port(), 0.05).find("2 of 3 ranks did not come within 0.05 seconds (rank 1, 2)"),
      std::string::npos);
  EXPECT_NE(failure_of(1, 3, free_port(), 0.05).find("MASTER_ADDR"), std::string::npos);
}

TEST(Rendezvous, RanksMustAgreeOnWhoTheyAre) {
  for (const auto& [rank, size] : {std::pair{1, 3}, std::pair{2, 3}}) {
    const int port = free_port();
    std::string zero, other;
    std::thread listener([&] { zero = failure_of(0, 2, port, kPatience); });
    other = failure_of(rank, size, port, kPatience);
    listener.join();
    EXPECT_NE(zero.find("of 3 came to a job of 2, WORLD_SIZE"), std::string::npos) << zero;
    EXPECT_NE(other.find("rank 0 turned rank"), std::string::npos) << other;
  }
  const int port = free_port();
  std::string zero;
  std::thread listener([&] { zero = failure_of(0, 3, port, kPatience); });
  std::thread first([&] { failure_of(1, 3, port, kPatience); }),
      second([&] { failure_of(1, 3, port, kPatience); });
  listener.join();
  first.join();
  second.join();
  EXPECT_NE(zero.find("two processes are rank 1"), std::string::npos) << zero;
}

TEST(Rendezvous, ARankThatGoesIsNamed) {
  const int port = free_port();
  std::string zero;
  std::thread listener([&] {
    try {
      Rendezvous meeting(0, 2, "", port, kPatience);
      meeting.gather("");
    } catch (const RunError& error) {
      zero = error.what();
    }
  });
  { const Rendezvous goes(1, 2, "localhost", port, kPatience); }
  listener.join();
  EXPECT_NE(zero.find("gone"), std::string::npos) << zero;
  EXPECT_NE(zero.find("rank 1"), std::string::npos) << zero;
}

TEST(Rendezvous, APortThatIsTakenIsNamed) {
  const int port = free_port();
  const int fd = socket(AF_INET6, SOCK_STREAM, 0);
  sockaddr_in6 address{};
  address.sin6_family = AF_INET6;
  address.sin6_port = htons(static_cast<uint16_t>(port));
  if (bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0 || listen(fd, 1) != 0)
    GTEST_SKIP() << "no IPv6 here";
  const std::string why = failure_of(0, 2, port, kPatience);
  close(fd);
  EXPECT_NE(why.find("MASTER_PORT"), std::string::npos) << why;
}
