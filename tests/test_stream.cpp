// Batches on their way in, steps as graphs, and results on their way out: on every device of this binary.
#include <gtest/gtest.h>

#include <bit>
#include <numeric>

#include "model/kernels/cast.h"
#include "model/kernels/readback.h"
#include "model/kernels/reduce.h"
#include "model/kernels/stream.h"
#include "tests/thread_orders.h"

namespace {
class Streams : public testing::TestWithParam<Where> {
 protected:
  Streams() {
    GetParam() == Where::cpu ? use_cpu(ctx_, 2) : use_gpu(ctx_, 0, DType::f32);
    ctx_.scratch.reserve(1 << 20);
  }
  std::vector<int32_t> ids(const Tensor& tensor) {
    const OnHost host(ctx_, tensor);
    return {host->i32(), host->i32() + host->size()};
  }
  void fill_with_ones(const Tensor& tensor) {
    OnHost host(ctx_, tensor);
    std::ranges::fill(host->floats(), 1.0f);
    host.store();
  }
  Context ctx_;
};
INSTANTIATE_TEST_SUITE_P(On, Streams,
                         testing::ValuesIn(kHaveGpu ? std::vector{Where::cpu, Where::gpu}
                                                    : std::vector{Where::cpu}),
                         [](const auto& info) { return info.param == Where::cpu ? "Cpu" : "Gpu"; });
}  // namespace

TEST_P(Streams, AnUploadStaysUntilTheSecondNext) {
  constexpr int64_t kCount = 100;
  Upload upload(ctx_, kCount);
  std::vector<int32_t> want[3];
  Tensor sent[3];
  for (int32_t round = 0; round < 3; ++round) {
    want[round].resize(kCount);
    std::iota(want[round].begin(), want[round].end(), 1000 * round);
    std::ranges::copy(want[round], upload.staging());
    sent[round] = upload.send(kCount);
    EXPECT_EQ(ids(sent[round]), want[round]);
    if (round > 0) {
      EXPECT_EQ(ids(sent[round - 1]), want[round - 1]) << round;
    }
  }
}

TEST_P(Streams, UploadsThatNobodyWaitsForAreUsedInTurn) {
  constexpr int64_t kCount = 100;
  constexpr int kRounds = 6;
  Tensor used[kRounds];
  Arena arena("test");
  for (Tensor& tensor : used) arena.add(&tensor, {kCount});
  arena.allocate(ctx_);
  Upload upload(ctx_, kCount);
  for_each_stream_order([&](const std::string& order) {
    SCOPED_TRACE(order);
    for (int32_t round = 0; round < kRounds; ++round) {
      std::fill_n(upload.staging(), kCount, 1000 + round);
      const Tensor sent = upload.send(kCount);
      cast(ctx_, {.y = used[round], .x = Tensor(static_cast<float*>(sent.data), {kCount})});  // the same bits
    }
    for (int32_t round = 0; round < kRounds; ++round) {
      const OnHost host(ctx_, used[round]);
      EXPECT_EQ(std::bit_cast<int32_t>(host->f32()[0]), 1000 + round);
      EXPECT_EQ(std::bit_cast<int32_t>(host->f32()[kCount - 1]), 1000 + round);
    }
  });
}

TEST_P(Streams, AGraphDoesItsWorkOnceEachTimeWithNewArguments) {
  Tensor x, y, sum;
  Arena arena("test");
  arena.add(&x, {1000});
  arena.add(&y, {1000});
  arena.add(&sum, DType::f64, {1});
  arena.allocate(ctx_);
  fill_with_ones(x);
  StepGraph graph(ctx_);
  Readback readback(ctx_, 1);
  std::vector<int64_t> tickets;
  double want = 0;
  for (int step = 1; step <= 5; ++step) {
    graph.run([&] {
      cast(ctx_, {.y = y, .x = x});
      mean(ctx_, {.out = sum, .x = y, .scale = static_cast<double>(step), .accumulate = step > 1});
      readback.fetch(sum);
    });
    tickets.push_back(readback.mark());
    if (step == 1) continue;  // read a step behind, as training does
    want += step - 1;
    EXPECT_EQ(readback.wait(tickets[static_cast<size_t>(step) - 2])[0], want);
  }
  EXPECT_EQ(readback.wait(tickets.back())[0], 15.0);
}

// Work that comes and goes between steps: the old graph cannot be updated then, and may still be at work.
TEST_P(Streams, AGraphOfAnotherShapeTakesItsPlace) {
  Tensor x, sum;
  Arena arena("test");
  arena.add(&x, {1000});
  arena.add(&sum, DType::f64, {1});
  arena.allocate(ctx_);
  fill_with_ones(x);
  StepGraph graph(ctx_);
  Readback readback(ctx_, 1);
  int64_t ticket = 0;
  double want = 0;
  for (const int times : {1, 1, 2, 2, 3, 1}) {
    graph.run([&] {
      for (int i = 0; i < times; ++i) mean(ctx_, {.out = sum, .x = x, .accumulate = true});
      readback.fetch(sum);
    });
    ticket = readback.mark();
    want += times;
  }
  EXPECT_EQ(readback.wait(ticket)[0], want);
}

TEST_P(Streams, AGraphWhoseBodyFailsLeavesTheStreamUsable) {
  StepGraph graph(ctx_);
  graph.run([] {});
  EXPECT_THROW(graph.run([] { throw std::runtime_error("no"); }), std::runtime_error);
  int runs = 0;
  graph.run([&] { ++runs; });
  ctx_.synchronize();
  EXPECT_EQ(runs, 1);
}

TEST_P(Streams, AGraphWhoseBodyWaitsIsRefusedOnAGpu) {
  Tensor x, y;
  Arena arena("test");
  arena.add(&x, {10});
  arena.add(&y, {10});
  arena.allocate(ctx_);
  StepGraph graph(ctx_);
  graph.run([] {});
  const std::function<void()> waits[] = {[&] { OnHost(ctx_, x); }, [&] { ctx_.synchronize(); }};
  for (const auto& body : waits) {
    if (GetParam() == Where::gpu) {
      EXPECT_THROW(graph.run(body), std::runtime_error);
    } else {
      EXPECT_NO_THROW(graph.run(body));
    }
  }
  graph.run([&] { cast(ctx_, {.y = y, .x = x}); });
  EXPECT_EQ(OnHost(ctx_, y)->f32()[0], 0);
}
