// Rates of the machine and the floors made of them: the counts of GPT-2 by hand, the slower of two
// directions, and that measuring leaves no trace in a profile. No test asks how fast anything is.
#include "model/rates.h"

#include <gtest/gtest.h>

#include <cmath>

#include "model/flops.h"
#include "tests/op_run.h"

namespace {
const ModelConfig kGpt2 = {};  // L = 12, C = 768, V = 50257, padded to 50304
constexpr int64_t kSmall = int64_t{1} << 20;

TEST(Flops, OfGpt2) {
  // 6 (12 * 12 * 768^2 + 50257 * 768) + 6 * 12 * 768 * 1024
  EXPECT_EQ(train_flops_per_token(kGpt2, 1024), 741'192'192.0 + 56'623'104.0);
  // 18 * 12 * 768 + 2 * 50304 values
  EXPECT_EQ(train_bytes_per_token(kGpt2, DType::bf16), 2 * 266'496.0);
  EXPECT_EQ(train_bytes_per_token(kGpt2, DType::f32), 4 * 266'496.0);
}

TEST(Flops, FloorIsProductsThenMemory) {
  const MachineRates rates{.flops = 797'815'296.0, .memory = {.bytes = 266'496.0, .reads = 1}};
  EXPECT_DOUBLE_EQ(floor_seconds(kGpt2, 1024, DType::bf16, 3, rates), 3 * (1 + 2.0));
}

TEST(Rates, MemoryWaitsForTheSlowerDirection) {
  const MemoryRates rates{.bytes = 60, .reads = 30};
  EXPECT_DOUBLE_EQ(memory_seconds(rates, 30, 30), 1);  // in place: both directions full
  EXPECT_DOUBLE_EQ(memory_seconds(rates, 60, 0), 2);   // reads alone
  EXPECT_DOUBLE_EQ(memory_seconds(rates, 0, 60), 1);   // writes alone: only their sum is known
  EXPECT_DOUBLE_EQ(memory_seconds({.bytes = 60}, 60, 0), 1);
}

class RatesOn : public testing::TestWithParam<Where> {
 protected:
  RatesOn() { GetParam() == Where::gpu ? use_gpu(ctx, 0, DType::f32) : use_cpu(ctx, 2); }
  Context ctx;
};

TEST_P(RatesOn, EachPassIsTimed) {
  MemoryPasses passes(ctx, kSmall);
  EXPECT_EQ(passes.block_bytes(), kSmall);
  for (int run = 0; run < 2; ++run) {
    const MemoryRates rates = passes.measure();
    EXPECT_TRUE(std::isfinite(rates.bytes) && rates.bytes > 0) << rates.bytes;
    EXPECT_TRUE(rates.reads > 0) << rates.reads;
    EXPECT_EQ(std::isinf(rates.reads), ctx.device != nullptr) << rates.reads;
  }
}

TEST_P(RatesOn, NoProfileSeesThem) {
  Profile profile;
  ctx.profile = &profile;
  MemoryPasses(ctx, kSmall).measure();
  EXPECT_TRUE(profile.rows().empty());
  EXPECT_EQ(ctx.profile, &profile);
}

INSTANTIATE_TEST_SUITE_P(Devices, RatesOn,
                         kHaveGpu ? testing::Values(Where::cpu, Where::gpu)
                                  : testing::Values(Where::cpu, Where::cpu),
                         [](const auto& info) { return std::string(info.index == 0 ? "cpu" : "gpu"); });
}  // namespace
