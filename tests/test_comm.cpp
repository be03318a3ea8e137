// The contract of the communicator, for every backend and every device of this binary. OwnerRun by itself it
// tests a single process; tests/test_ranks.sh runs it under mpirun with several numbers of ranks.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <numeric>
#include <thread>

#include "model/kernels/backends.h"
#include "model/kernels/comm_exchange.h"
#include "model/kernels/comm_mpi.h"
#include "model/kernels/context.h"
#include "model/kernels/readback.h"
#include "random.h"
#include "tests/rank_fixture.h"
#include "world/world.h"

namespace {
/// Something to exchange: every rank can say what every other one holds.
struct Item {
  Shape shape;
  DType dtype = DType::f32;
  int owner = 0;
};

/// The bytes that `rank` puts into item number `index`: numbers of many magnitudes, so that the order of a
/// sum shows in its bits.
std::vector<char> content(const Item& item, size_t index, int rank) {
  Random random(99, index * 1000 + static_cast<size_t>(rank));
  const auto count = static_cast<size_t>(item.shape.size());
  std::vector<char> bytes(count * static_cast<size_t>(dtype_bytes(item.dtype)));
  for (size_t i = 0; i < count; ++i) {
    const double x = std::ldexp(random.uniform() - 0.5, static_cast<int>(random.bits() % 12));
    const auto narrow = static_cast<float>(x);
    const Bf16 half = to_bf16(narrow);
    if (item.dtype == DType::f64) std::memcpy(&bytes[8 * i], &x, 8);
    if (item.dtype == DType::f32) std::memcpy(&bytes[4 * i], &narrow, 4);
    if (item.dtype == DType::bf16) std::memcpy(&bytes[2 * i], &half, 2);
  }
  return bytes;
}

/// ((x_0 + x_1) + x_2) + ..., by a plain loop.
template <typename T>
std::vector<char> sum_of(const Item& item, size_t index, const std::vector<int>& ranks) {
  std::vector<char> bytes = content(item, index, ranks[0]);
  for (size_t r = 1; r < ranks.size(); ++r) {
    const std::vector<char> next = content(item, index, ranks[r]);
    for (size_t i = 0; i < bytes.size(); i += sizeof(T)) {
      T a, b;
      std::memcpy(&a, &bytes[i], sizeof a);
      std::memcpy(&b, &next[i], sizeof b);
      a += b;
      std::memcpy(&bytes[i], &a, sizeof a);
    }
  }
  return bytes;
}
std::vector<char> sum_of(const Item& item, size_t index, const std::vector<int>& ranks) {
  return item.dtype == DType::f64 ? sum_of<double>(item, index, ranks) : sum_of<float>(item, index, ranks);
}

class Comms : public RankTest, public testing::WithParamInterface<Where> {
 protected:
  Comms() {
    GetParam() == Where::cpu ? use_cpu(ctx_, 1) : use_gpu(ctx_, gpu_of_rank(), DType::f32);
    join(1 << 20);
  }

  std::vector<int> all_ranks() const {
    std::vector<int> ranks(static_cast<size_t>(comm().size()));
    std::iota(ranks.begin(), ranks.end(), 0);
    return ranks;
  }

  /// Tensors that hold this rank's content, as parts.
  std::vector<Part> make(const std::vector<Item>& items) {
    arenas_.push_back(std::make_unique<Arena>("test"));
    tensors_.push_back(std::vector<Tensor>(items.size()));
    std::vector<Tensor>& tensors = tensors_.back();
    for (size_t i = 0; i < items.size(); ++i)
      arenas_.back()->add(&tensors[i], items[i].dtype, items[i].shape);
    arenas_.back()->allocate(ctx_);
    std::vector<Part> parts;
    for (size_t i = 0; i < items.size(); ++i) {
      OnHost host(ctx_, tensors[i]);
      const std::vector<char> mine = content(items[i], i, comm().rank());
      if (!mine.empty()) std::memcpy(host->data, mine.data(), mine.size());
      host.store();
      parts.push_back({tensors[i], items[i].owner});
    }
    return parts;
  }
  static std::vector<Tensor> tensors_of(const std::vector<Part>& parts) {
    std::vector<Tensor> tensors;
    for (const Part& part : parts) tensors.push_back(part.tensor);
    return tensors;
  }
  std::vector<char> bytes_of(const Tensor& tensor) {
    const OnHost host(ctx_, tensor);
    const char* data = static_cast<const char*>(host->data);
    return {data, data + (tensor.size() > 0 ? tensor.bytes() : 0)};
  }

  void expect_sums(const std::vector<Item>& items, const std::vector<Part>& parts) {
    for (size_t i = 0; i < items.size(); ++i)
      EXPECT_EQ(bytes_of(parts[i].tensor), sum_of(items[i], i, all_ranks())) << "tensor " << i;
  }
  void expect_sums_at_owners(const std::vector<Item>& items, const std::vector<Part>& parts) {
    for (size_t i = 0; i < items.size(); ++i) {
      if (items[i].owner != comm().rank()) continue;
      EXPECT_EQ(bytes_of(parts[i].tensor), sum_of(items[i], i, all_ranks())) << "part " << i;
    }
  }
  void expect_owners_content(const std::vector<Item>& items, const std::vector<Part>& parts) {
    for (size_t i = 0; i < items.size(); ++i)
      EXPECT_EQ(bytes_of(parts[i].tensor), content(items[i], i, items[i].owner)) << "part " << i;
  }

  /// Odd sizes and an empty one; every third rank owns nothing, owners are not in order.
  std::vector<Item> scattered(std::vector<DType> dtypes) const {
    std::vector<Item> items;
    for (int64_t i = 0; i < 3 * comm().size() + 2; ++i) {
      int owner = static_cast<int>(7 * i + 1) % comm().size();
      if (owner % 3 == 2) owner = 0;
      items.push_back({{i % 4, 5 * i + 1}, dtypes[static_cast<size_t>(i) % dtypes.size()], owner});
    }
    return items;
  }

 private:
  std::vector<std::unique_ptr<Arena>> arenas_;
  std::vector<std::vector<Tensor>> tensors_;
};
INSTANTIATE_TEST_SUITE_P(On, Comms,
                         testing::ValuesIn(kHaveGpu ? std::vector{Where::cpu, Where::gpu}
                                                    : std::vector{Where::cpu}),
                         [](const auto& info) { return info.param == Where::cpu ? "Cpu" : "Gpu"; });

const std::vector<Item> kSums = {{{7, 3}}, {{5}, DType::f64}, {{0}}, {{1}}, {{1000}, DType::f64}, {{3001}}};
}  // namespace

TEST_P(Comms, SumsHaveTheBitsOfTheOrderOfRanks) {
  const auto parts = make(kSums);
  comm().finish(comm().start_sum(tensors_of(parts)));
  expect_sums(kSums, parts);
  if (comm().size() < 3) return;
  // Another order would have shown.
  std::vector<int> backwards = all_ranks();
  std::reverse(backwards.begin(), backwards.end());
  EXPECT_NE(sum_of(kSums.back(), 5, all_ranks()), sum_of(kSums.back(), 5, backwards));
}

TEST_P(Comms, ReduceScatterSumsAtTheOwnerAlone) {
  const auto items = scattered({DType::f32, DType::f64});
  const auto parts = make(items);
  comm().finish(comm().start_reduce_scatter(parts));
  expect_sums_at_owners(items, parts);
}

TEST_P(Comms, AllGatherTakesTheOwnersPartsToAll) {
  const auto items = scattered({DType::bf16, DType::f32, DType::f64, DType::bf16});
  const auto parts = make(items);
  comm().finish(comm().start_all_gather(parts));
  expect_owners_content(items, parts);
}

TEST_P(Comms, EqualPartsInTheOrderOfRanks) {
  std::vector<Item> items;
  for (int rank = 0; rank < comm().size(); ++rank) items.push_back({{2, 32, 64}, DType::f32, rank});
  const auto parts = make(items);
  comm().finish(comm().start_reduce_scatter(parts));
  expect_sums_at_owners(items, parts);
  const auto again = make(items);
  comm().finish(comm().start_all_gather(again));
  expect_owners_content(items, again);
}

TEST_P(Comms, BroadcastComesFromTheRoot) {
  for (const int root : {0, comm().size() - 1}) {
    const std::vector<Item> items = {{{37, 3}, DType::bf16, root}};
    const auto parts = make(items);
    comm().finish(comm().start_broadcast(parts[0].tensor, root));
    expect_owners_content(items, parts);
  }
}

TEST_P(Comms, NothingAtAllCanBeExchanged) {
  const std::vector<Item> items = {{{0}}, {{0, 4}, DType::f64, comm().size() - 1}};
  const auto parts = make(items);
  for (const auto some : {std::span<const Part>(), std::span<const Part>(parts)}) {
    comm().finish(comm().start_reduce_scatter(some));
    comm().finish(comm().start_all_gather(some));
  }
  comm().finish(comm().start_sum({}));
  EXPECT_EQ(comm().costs().sent, 0);
}

TEST_P(Comms, SeveralUnderWayFinishInAnyOrder) {
  const auto items = scattered({DType::f32});
  const auto summed = make(kSums), reduced = make(items), gathered = make(items);
  const Comm::Ticket first = comm().start_reduce_scatter(reduced);
  const Comm::Ticket second = comm().start_sum(tensors_of(summed));
  const Comm::Ticket third = comm().start_all_gather(gathered);
  double one = 1;
  comm().sum({&one, 1});
  EXPECT_EQ(one, comm().size());
  comm().finish(third);
  expect_owners_content(items, gathered);
  comm().finish(first);
  comm().finish(third);
  comm().finish(first);
  expect_sums_at_owners(items, reduced);
  comm().finish(second);
  expect_sums(kSums, summed);
}

TEST_P(Comms, MessagesAreCutAnywhereBetweenElements) {
  join(20);  // bytes: not a multiple of 8
  const auto items = scattered({DType::f32, DType::f64});
  const auto moved = scattered({DType::bf16, DType::f64});
  const auto summed = make(kSums), reduced = make(items), gathered = make(moved);
  const Comm::Ticket tickets[] = {comm().start_sum(tensors_of(summed)), comm().start_reduce_scatter(reduced),
                                  comm().start_all_gather(gathered)};
  for (const Comm::Ticket ticket : tickets) comm().finish(ticket);
  expect_sums(kSums, summed);
  expect_sums_at_owners(items, reduced);
  expect_owners_content(moved, gathered);
}

TEST_P(Comms, MemoryThatWasReservedIsUsedAgain) {
  comm().reserve(1 << 16);
  const auto items = scattered({DType::f32});
  for (int step = 0; step < 3; ++step) {
    const auto reduced = make(items), gathered = make(items);
    const Comm::Ticket first = comm().start_reduce_scatter(reduced);
    const Comm::Ticket second = comm().start_all_gather(gathered);
    comm().finish(second);
    const auto more = make(items);
    const Comm::Ticket third = comm().start_reduce_scatter(more);
    comm().finish(first);
    comm().finish(third);
    expect_sums_at_owners(items, reduced);
    expect_sums_at_owners(items, more);
    expect_owners_content(items, gathered);
  }
}

TEST_P(Comms, NumbersOfTheHostAreSummedInOrder) {
  const Item item{{257}, DType::f64};
  std::vector<double> values(257);
  std::memcpy(values.data(), content(item, 3, comm().rank()).data(), values.size() * sizeof(double));
  comm().sum(values);
  std::vector<double> want(values.size());
  std::memcpy(want.data(), sum_of(item, 3, all_ranks()).data(), want.size() * sizeof(double));
  EXPECT_EQ(values, want);
}

TEST_P(Comms, CostsAreThoseOfTheFormula) {
  const int64_t others = comm().size() - 1;
  const auto items = scattered({DType::f32, DType::f64});
  const auto parts = make(items);
  int64_t mine = 0, all = 0;
  for (const Part& part : parts) {
    all += part.tensor.bytes();
    if (part.owner == comm().rank()) mine += part.tensor.bytes();
  }
  int64_t sent = 0;
  const auto expect_sent = [&](int64_t more, const char* what) {
    sent += more;
    EXPECT_EQ(comm().costs().sent, sent) << what;
  };
  comm().finish(comm().start_sum(tensors_of(parts)));
  expect_sent(others * all, "sum");
  comm().finish(comm().start_reduce_scatter(parts));
  expect_sent(others > 0 ? all - mine : 0, "reduce-scatter");
  comm().finish(comm().start_all_gather(parts));
  expect_sent(others * mine, "all-gather");
  comm().finish(comm().start_broadcast(parts[1].tensor, 0));
  expect_sent(comm().rank() == 0 ? others * parts[1].tensor.bytes() : 0, "broadcast");
  double numbers[3] = {1, 2, 3};
  comm().sum(numbers);
  expect_sent(others * 24, "sum of numbers");
  comm().barrier();
  expect_sent(others * 8, "barrier");
  const CommCosts costs = comm().costs();
  if (others == 0) return;
  EXPECT_GT(costs.busy, 0);
  EXPECT_GT(costs.exposed, 0);
  EXPECT_GE(costs.hidden(), -1e-9);  // what is exposed is a part of what is busy
}

TEST_P(Comms, WhatCannotBeExchangedIsRefused) {
  if (comm().alone()) GTEST_SKIP() << "a single process exchanges nothing";
  const auto parts = make({{{4}, DType::bf16}, {{4}, DType::i32}, {{4}, DType::f32, comm().size()}});
  EXPECT_THROW(comm().start_sum({&parts[0].tensor, 1}), ShapeError);
  EXPECT_THROW(comm().start_reduce_scatter({&parts[0], 1}), ShapeError);
  EXPECT_THROW(comm().start_all_gather({&parts[1], 1}), ShapeError);
  EXPECT_THROW(comm().start_all_gather({&parts[2], 1}), ShapeError);
  EXPECT_THROW(comm().start_broadcast(parts[0].tensor, -1), ShapeError);
  EXPECT_THROW(comm().finish(1000), std::logic_error);
  comm().barrier();  // and nothing is broken
}

TEST_P(Comms, TheNameSaysHowMany) {
  const std::string name = comm().name();
  EXPECT_EQ(name.substr(0, name.find(' ')), std::to_string(comm().size()));
}

// What NCCL is asked to do, which needs no NCCL to be seen.
TEST(OwnerRuns, EqualPartsInTheOrderOfRanksBecomeOne) {
  float memory[40];
  const auto part = [&](int64_t start, int64_t count, int owner) {
    return Part{Tensor(memory + start, {count}), owner};
  };
  // Two matrices of 3 for each of three ranks; then a bank in which rank 2 has less; then one out of order.
  const std::vector<Part> parts = {part(0, 3, 0),  part(3, 3, 0),  part(6, 3, 1),  part(9, 3, 1),
                                   part(12, 3, 2), part(15, 3, 2), part(18, 4, 0), part(22, 0, 0),
                                   part(22, 4, 1), part(26, 2, 2), part(30, 2, 1), part(28, 2, 0),
                                   part(32, 2, 2)};
  const std::vector<OwnerRun> runs = find_runs(parts, 3);
  ASSERT_EQ(runs.size(), 7u);
  const auto expect = [&](size_t i, int64_t start, int64_t count, int owner) {
    EXPECT_EQ(runs[i].data, reinterpret_cast<char*>(memory + start)) << i;
    EXPECT_EQ(runs[i].count, count) << i;
    EXPECT_EQ(runs[i].owner, owner) << i;
  };
  expect(0, 0, 6, OwnerRun::kOneEach);
  expect(1, 18, 4, 0);
  expect(2, 22, 4, 1);
  expect(3, 26, 2, 2);
  expect(4, 30, 2, 1);
  expect(5, 28, 2, 0);
  expect(6, 32, 2, 2);
  // A gap, and types that differ, keep blocks apart.
  EXPECT_EQ(find_runs(std::vector<Part>{part(0, 2, 0), part(3, 2, 1)}, 2).size(), 2u);
  const Part bits{Tensor(reinterpret_cast<Bf16*>(memory + 2), {2}), 1};
  EXPECT_EQ(find_runs(std::vector<Part>{part(0, 2, 0), bits}, 2).size(), 2u);
}

// Failures end the job, so each has a job of its own in tests/test_ranks.sh.
namespace {
class CommFailures : public RankTest {};
}  // namespace

TEST_F(CommFailures, DISABLED_AWatchEndsTheWaitForARankThatHangs) {
  use_cpu(ctx_, 1);
  int looks = 0;
  join(1 << 20, [&] {
    if (++looks == 2) throw std::runtime_error("rank 1 hangs");
  });
  double number = 1;
  comm().sum({&number, 1});
  if (comm().rank() == 1) pause();  // until mpirun ends it
  const Tensor tensor(&number, {1});
  EXPECT_THROW(comm().finish(comm().start_sum({&tensor, 1})), std::runtime_error);
  EXPECT_THROW(comm().barrier(), std::runtime_error) << "nothing works after a failure";
}

TEST_F(CommFailures, DISABLED_AnExceptionDropsWhatIsUnderWay) {
  use_cpu(ctx_, 1);
  join(1 << 20);
  comm().barrier();
  if (comm().rank() == 1) pause();
  double number = 1;
  const Tensor tensor(&number, {1});
  EXPECT_THROW(
      {
        Context ctx;
        std::swap(ctx.comm, ctx_.comm);
        ctx.comm->start_sum({&tensor, 1});
        throw std::runtime_error("a loss that is not finite");
      },
      std::runtime_error);
}

TEST_F(CommFailures, DISABLED_RanksThatDoNotDoTheSameAreTold) {
  use_cpu(ctx_, 1);
  join(1 << 20);
  double numbers[2] = {1, 2};
  try {
    comm().sum({numbers, comm().rank() == 1 ? size_t{1} : size_t{2}});
    if (comm().rank() == 1) pause();
    ADD_FAILURE() << "a short message went unnoticed";
  } catch (const std::runtime_error& error) {
    EXPECT_TRUE(std::string(error.what()).find("rank") != std::string::npos) << error.what();
  }
}

// Over NCCL nothing but the stream stands in an exchange; the host, which reads a number behind it, must tell
// a watch all the same.
TEST_F(CommFailures, DISABLED_AGpuThatWaitsForAnotherDoesNotHang) {
  if constexpr (!kHaveGpu) GTEST_SKIP() << "no GPU path in this build";
  use_gpu(ctx_, gpu_of_rank(), DType::f32);
  int looks = 0;
  join(1 << 20, [&] {
    if (++looks == 2) throw std::runtime_error("rank 1 hangs");
  });
  Tensor sum, number;
  Arena arena("test");
  arena.add(&sum, {1000});
  arena.add(&number, DType::f64, {1});
  arena.allocate(ctx_);
  Readback readback(ctx_, 1);
  comm().barrier();
  if (comm().rank() == 1) return meet();  // without a part in the exchange
  EXPECT_THROW(
      {
        std::shared_ptr<Comm> until_the_exception = std::make_shared<Comm>();
        std::swap(until_the_exception, ctx_.comm);
        until_the_exception->finish(until_the_exception->start_sum({&sum, 1}));
        readback.fetch(number);
        readback.wait(readback.mark());
      },
      std::runtime_error);
  EXPECT_EQ(looks, 2);
  meet();
}

// The way of the program, from the launcher's variables to a communicator.
TEST(Worlds, DISABLED_RanksOfMpirunJoin) {
  Context ctx;
  World world(find_launch());
  use_cpu(ctx, world.threads());
  EXPECT_EQ(world.local_size(), world.size());
  EXPECT_EQ(world.local_rank(), world.rank());
  const auto heard = world.gather("I am " + std::to_string(world.rank()));
  ASSERT_EQ(heard.size(), static_cast<size_t>(world.size()));
  for (size_t r = 0; r < heard.size(); ++r) EXPECT_EQ(heard[r], "I am " + std::to_string(r));
  world.join(ctx);
  EXPECT_EQ(std::string(ctx.comm->name()), std::to_string(world.size()) + " ranks over MPI");
  double threads = ctx.threads;
  ctx.comm->sum({&threads, 1});
  const auto cores = static_cast<double>(std::thread::hardware_concurrency());
  EXPECT_LE(threads, std::max(cores, static_cast<double>(world.size()))) << "more threads than cores";
}
