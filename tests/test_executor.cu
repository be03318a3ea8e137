// The executor (dev/cuda_on_cpu) catches what it promises to catch: each test plants a classic bug. Empty on
// a GPU, where such kernels hang or crash.
#ifdef CUDA_ON_CPU
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <numeric>

#include "dev/cuda_on_cpu/device_memory.h"
#include "model/kernels/mma.h"
#include "tests/thread_orders.h"

namespace {
using cuda_on_cpu::kAsan, cuda_on_cpu::kTsan;

/// A kernel on host vectors: arrays that kernels here write are ordinary memory, for short tests.
template <typename... Parameters, typename... Arguments>
void run(const Launch& how, void (*kernel)(Parameters...), Arguments... arguments) {
  cuda_on_cpu::run(
      how.grid, how.block, how.shared, [&] { kernel(static_cast<Parameters>(arguments)...); },
      reinterpret_cast<const void*>(kernel));
}

/// Death tests start a fresh process: a fork would copy one of several threads.
class ExecutorMemory : public testing::Test {
 protected:
  ExecutorMemory() { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
  ~ExecutorMemory() override { cuda_on_cpu::set_order("forward"); }
};
using ExecutorBugs = ExecutorMemory;
using ExecutorDeathTest = ExecutorMemory;

// ------------------------------------------------------------------------------------------- several workers

__global__ void count_visits(int* visits, double* sums) {
  __shared__ double part[32];
  part[threadIdx.x] = std::sqrt(static_cast<double>(blockIdx.x * 32 + threadIdx.x));
  __syncthreads();
  if (threadIdx.x != 0) return;
  ++visits[blockIdx.x];
  sums[blockIdx.x] = std::accumulate(part, part + 32, 0.0);
}

/// 100 grids of 300 blocks: whether each block ran once, alone with its shared memory.
bool every_block_runs_once() {
  std::vector<int> visits(300);
  std::vector<double> sums(300), expected(300);
  for (int i = 0; i < 300 * 32; ++i) expected[static_cast<size_t>(i / 32)] += std::sqrt(double{1} * i);
  for (int grid = 0; grid < 100; ++grid) {
    run({.grid = 300, .block = 32}, count_visits, visits.data(), sums.data());
    if (sums != expected) return false;
  }
  return visits == std::vector<int>(300, 100);
}

/// Tests run with one worker, a process for each core (tests/gtest.sh), so this one starts a process with
/// more.
TEST_F(ExecutorMemory, SeveralWorkersShareTheBlocks) {
  if (kTsan) GTEST_SKIP() << "a race check has one worker";
  EXPECT_EXIT(
      {
        setenv("CUDA_ON_CPU_THREADS", "4", 1);
        std::exit(every_block_runs_once() ? 0 : 1);
      },
      testing::ExitedWithCode(0), "");
}

// ----------------------------------------------------------------------------------------- missing barriers

template <bool kForget>
__global__ void reverse_block(float* y, const float* x) {
  __shared__ float tile[64];
  tile[threadIdx.x] = x[threadIdx.x];
  if (!kForget) __syncthreads();
  y[threadIdx.x] = tile[63 - threadIdx.x];
}

template <bool kForget>
bool reverses() {
  std::vector<float> x(64), y(64);
  std::iota(x.begin(), x.end(), 0.0f);
  run({.grid = 1, .block = 64}, reverse_block<kForget>, y.data(), x.data());
  return std::equal(x.begin(), x.end(), y.rbegin());
}

TEST_F(ExecutorBugs, MissingBarrierGivesWrongValuesInEveryOrder) {
  for_each_thread_order([](const std::string& order) {
    EXPECT_TRUE(reverses<false>()) << order;
    EXPECT_FALSE(reverses<true>()) << order;
  });
}

template <bool kForget>
__global__ void rotate_rounds(float* y) {
  __shared__ float tile[64];
  float mine = threadIdx.x;
  for (int round = 0; round < 4; ++round) {
    tile[threadIdx.x] = mine;
    __syncthreads();
    mine = tile[(threadIdx.x + 33) % 64];
    if (!kForget) __syncthreads();  // the tile is written again above
  }
  y[threadIdx.x] = mine;
}

TEST_F(ExecutorBugs, MissingBarrierBeforeOverwritingGivesWrongValuesInSomeOrder) {
  std::vector<float> y(64);
  int wrong = 0;
  for_each_thread_order([&](const std::string& order) {
    run({.grid = 1, .block = 64}, rotate_rounds<false>, y.data());
    for (int i = 0; i < 64; ++i) EXPECT_EQ(y[i], (i + 4 * 33) % 64) << order;
    run({.grid = 1, .block = 64}, rotate_rounds<true>, y.data());
    for (int i = 0; i < 64; ++i) wrong += y[i] != (i + 4 * 33) % 64;
  });
  EXPECT_GT(wrong, 0);
}

template <bool kForget>
__global__ void exchange_in_warp(int* y) {
  __shared__ int tile[32];
  tile[threadIdx.x] = threadIdx.x;
  if (!kForget) __syncwarp();
  y[threadIdx.x] = tile[threadIdx.x ^ 1];
}

TEST_F(ExecutorBugs, MissingSyncwarpGivesWrongValuesInEveryOrder) {
  std::vector<int> y(32), want(32);
  for (int i = 0; i < 32; ++i) want[i] = i ^ 1;
  for_each_thread_order([&](const std::string& order) {
    run({.grid = 1, .block = 32}, exchange_in_warp<false>, y.data());
    EXPECT_EQ(y, want) << order;
    run({.grid = 1, .block = 32}, exchange_in_warp<true>, y.data());
    EXPECT_NE(y, want) << order;
  });
}

// --------------------------------------------------------------------------------- uninitialised, too early

__global__ void read_unwritten(float* y) {
  DYN_SHARED(float, dynamic);
  __shared__ float fixed[4];
  if (threadIdx.x == 0) {
    y[0] = dynamic[5];
    y[1] = fixed[2];
    dynamic[5] = fixed[2] = 1;  // the next block must not see these
  }
}

TEST_F(ExecutorMemory, SharedMemoryBeginsAsNan) {
  std::vector<float> y(2);
  for (int round = 0; round < 2; ++round) {
    run({.grid = 2, .block = 32, .shared = 64}, read_unwritten, y.data());
    EXPECT_TRUE(std::isnan(y[0]));
    EXPECT_TRUE(std::isnan(y[1]));
  }
}

TEST_F(ExecutorMemory, DeviceMemoryBeginsAsNan) {
  void* block = nullptr;
  ASSERT_EQ(cudaMalloc(&block, 64), cudaSuccess);
  float here[16];
  ASSERT_EQ(cudaMemcpy(here, block, 64, cudaMemcpyDeviceToHost), cudaSuccess);
  for (float x : here) EXPECT_TRUE(std::isnan(x));
  EXPECT_EQ(cudaFree(block), cudaSuccess);
}

/// kWait: groups that may still be going when the first one is read.
template <int kWait>
__global__ void copy_two_groups(float* y, const float* x) {
  DYN_SHARED(float, tile);
  cp_async16(tile + 4 * threadIdx.x, x + 4 * threadIdx.x);
  cp_async_commit();
  cp_async16(tile + 128 + 4 * threadIdx.x, x + 128 + 4 * threadIdx.x);
  cp_async_commit();
  if (kWait >= 0) cp_async_wait<(kWait >= 0 ? kWait : 0)>();
  __syncthreads();
  y[threadIdx.x] = tile[4 * (threadIdx.x ^ 1)];
  y[32 + threadIdx.x] = tile[128 + 4 * (threadIdx.x ^ 1)];
}

TEST_F(ExecutorBugs, CopiesArriveWhenTheirGroupIsWaitedForAndNotBefore) {
  alignas(16) float x[256];
  std::iota(x, x + 256, 1.0f);
  const auto arrived = [&](auto kernel) {
    std::vector<float> y(64);
    run({.grid = 1, .block = 32, .shared = 1024}, kernel, y.data(), x);
    return std::pair(!std::isnan(y[0]), !std::isnan(y[32]));
  };
  EXPECT_EQ(arrived(copy_two_groups<0>), std::pair(true, true));
  EXPECT_EQ(arrived(copy_two_groups<1>), std::pair(true, false));
  EXPECT_EQ(arrived(copy_two_groups<-1>), std::pair(false, false));
}

// ----------------------------------------------------------------------- divergence, deadlocks, wrong masks

__global__ void shuffle_in_half_a_warp(float* y) {
  float v = 1;
  if (threadIdx.x < 16) v += __shfl_xor_sync(kFullMask, v, 1);
  y[threadIdx.x] = v;
}
TEST_F(ExecutorDeathTest, ShuffleThatHalfTheWarpReaches) {
  std::vector<float> y(32);
  EXPECT_DEATH(run({.grid = 1, .block = 32}, shuffle_in_half_a_warp, y.data()),
               "returns while lanes 0000ffff wait for it in __shfl_xor_sync, mask ffffffff(.|\n)*"
               "in kernel shuffle_in_half_a_warp, block \\(0,0,0\\), thread \\(16,0,0\\)");
}

__global__ void diverge(float* y) {
  if (threadIdx.x < 16)
    y[0] = __shfl_sync(kFullMask, 1.0f, 0);
  else
    y[0] = __ballot_sync(kFullMask, 1);
}
TEST_F(ExecutorDeathTest, LanesInDifferentOperations) {
  float y;
  EXPECT_DEATH(run({.grid = 1, .block = 32}, diverge, &y),
               "diverge: lanes 0000ffff wait in __shfl_sync, lane 16 comes to __ballot_sync");
}

__global__ void wrong_mask(float* y) {
  y[threadIdx.x] = __shfl_sync(0x0000ffff, 1.0f, 0);
}
TEST_F(ExecutorDeathTest, MaskWithoutTheCaller) {
  std::vector<float> y(32);
  EXPECT_DEATH(run({.grid = 1, .block = 32}, wrong_mask, y.data()),
               "__shfl_sync: lane 16 calls with mask 0000ffff, which does not name it");
}

__global__ void mask_of_the_dead(float* y) {
  if (threadIdx.x == 3) return;
  y[threadIdx.x] = __shfl_sync(kFullMask, 1.0f, 0);
}
TEST_F(ExecutorDeathTest, MaskThatNamesLanesThatReturned) {
  std::vector<float> y(32);
  EXPECT_DEATH(
      {
        cuda_on_cpu::set_order("reverse");
        run({.grid = 1, .block = 20}, mask_of_the_dead, y.data());
      },
      "mask ffffffff names lanes fff00000, which have returned or do not exist");
}

__global__ void read_outside_of_mask(float* y) {
  if (threadIdx.x < 8) y[threadIdx.x] = __shfl_sync(0xffu, 1.0f, 9);
}
TEST_F(ExecutorDeathTest, ShuffleFromALaneThatTheMaskDoesNotName) {
  std::vector<float> y(32);
  EXPECT_DEATH(run({.grid = 1, .block = 32}, read_outside_of_mask, y.data()),
               "__shfl_sync: lane . reads lane 9, which mask 000000ff does not name");
}

__global__ void barrier_for_some(float* y) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    while (true) y[0] = __shfl_sync(kFullMask, 1.0f, 0), named_barrier(1, 64);
  }
}
TEST_F(ExecutorDeathTest, DeadlockSaysWhoWaitsWhere) {
  float y;
  EXPECT_DEATH(
      run({.grid = 1, .block = 64}, barrier_for_some, &y),
      "threads 0 to 31 wait in __syncthreads \\(test_executor.cu:[0-9]+\\)(.|\n)*"
      "threads 32 to 63 wait in named_barrier \\(test_executor.cu:[0-9]+\\), barrier 1 has 32 of 64");
}

__global__ void barrier_of_two_sizes() {
  named_barrier(1, threadIdx.x < 32 ? 64 : 96);
}
TEST_F(ExecutorDeathTest, BarrierCalledForDifferentCounts) {
  EXPECT_DEATH(run({.grid = 1, .block = 96}, barrier_of_two_sizes),
               "barrier 1 is called for 64 threads and for 96");
}
__global__ void barrier_of_part_of_a_warp() {
  named_barrier(1, 16);
}
TEST_F(ExecutorDeathTest, BarrierForPartOfAWarp) {
  EXPECT_DEATH(run({.grid = 1, .block = 32}, barrier_of_part_of_a_warp),
               "barrier 1 for 16 threads, not whole warps");
}

// ------------------------------------------------------------------------------ bounds, alignment, the host

__global__ void write_at(float* y, int64_t i) {
  y[i] = 1;
}
__global__ void write_shared_at(int i) {
  DYN_SHARED(float, tile);
  tile[i] = 1;
}
template <typename T>
T* device_array(size_t count) {
  void* block = nullptr;
  cudaMalloc(&block, count * sizeof(T));
  return static_cast<T*>(block);
}

TEST_F(ExecutorDeathTest, WritePastTheEndOfAnAllocation) {
  // Exactly at the end of a page there is nothing behind; the sanitizer knows each byte.
  EXPECT_DEATH(run({.grid = 1, .block = 1}, write_at, device_array<float>(1024), int64_t{1024}),
               kAsan ? "use-after-poison|SEGV"
                     : "a kernel touched inaccessible device memory(.|\n)*"
                       "0 bytes past the end of allocation 1, 4096 bytes(.|\n)*"
                       "in kernel write_at");
}
TEST_F(ExecutorDeathTest, WriteJustPastAnOddAllocationIsFoundWhenItIsFreed) {
  EXPECT_DEATH(
      {
        float* y = device_array<float>(3);
        run({.grid = 1, .block = 1}, write_at, y, int64_t{3});
        cudaFree(y);
      },
      kAsan ? "use-after-poison" : "device memory was written out of bounds(.|\n)*0 bytes past the end");
}
TEST_F(ExecutorDeathTest, WriteBeforeAnAllocation) {
  EXPECT_DEATH(
      {
        float* y = device_array<float>(64);
        run({.grid = 1, .block = 1}, write_at, y, int64_t{-1});
        cudaFree(y);
      },
      kAsan ? "use-after-poison" : "written out of bounds(.|\n)*4 bytes before allocation 1");
}
TEST_F(ExecutorDeathTest, UseAfterFree) {
  EXPECT_DEATH(
      {
        float* y = device_array<float>(64);
        cudaFree(y);
        run({.grid = 1, .block = 1}, write_at, y, int64_t{0});
      },
      "a kernel touched inaccessible device memory(.|\n)*freed, or never allocated");
}
TEST_F(ExecutorDeathTest, WritePastDynamicSharedMemory) {
  EXPECT_DEATH(run({.grid = 1, .block = 1, .shared = 64}, write_shared_at, 16),
               kAsan ? "use-after-poison" : "past the end of its 64 bytes of dynamic shared memory");
}
TEST_F(ExecutorDeathTest, HostCodeTouchesDeviceMemory) {
  EXPECT_DEATH(
      {
        volatile float* y = device_array<float>(64);
        y[5] = 1;
      },
      "host code touched device memory at 0x[0-9a-f]+\n(.|\n)*20 bytes from the beginning of allocation 1, "
      "256 bytes");
}
TEST_F(ExecutorDeathTest, HostCodeReadsAResultWithoutCopyingIt) {
  EXPECT_DEATH(
      {
        float* y = device_array<float>(64);
        run({.grid = 1, .block = 1}, write_at, y, int64_t{0});
        std::printf("%f", *const_cast<volatile float*>(y));
      },
      "host code touched device memory");
}
TEST_F(ExecutorMemory, GuardCanBeTurnedOff) {
  cuda_on_cpu::guard_device_memory(false);
  float* y = device_array<float>(64);
  y[5] = 1;
  cuda_on_cpu::guard_device_memory(true);
  float x = 0;
  EXPECT_EQ(cudaMemcpy(&x, y + 5, 4, cudaMemcpyDeviceToHost), cudaSuccess);
  EXPECT_EQ(x, 1);
  cudaFree(y);
}

__global__ void load_misaligned(float4* y, const float* x) {
  *y = __ldg(reinterpret_cast<const float4*>(x + 1));
}
TEST_F(ExecutorDeathTest, MisalignedVectorLoad) {
  float4 y;
  alignas(16) float x[8] = {};
  EXPECT_DEATH(run({.grid = 1, .block = 1}, load_misaligned, &y, x),
               "__ldg: address 0x[0-9a-f]+ is not aligned to 16");
}
__global__ void copy_misaligned(const float* x) {
  DYN_SHARED(float, tile);
  cp_async16(tile + 1, x);
}
TEST_F(ExecutorDeathTest, MisalignedCopy) {
  alignas(16) float x[8] = {};
  EXPECT_DEATH(run({.grid = 1, .block = 1, .shared = 64}, copy_misaligned, x),
               "cp_async: address .* is not aligned to 16");
}

__global__ void recurse_deeply(volatile int* depth, int n) {
  volatile char frame[4096];
  frame[0] = static_cast<char>(n);
  *depth = n;
  if (n < 1000) recurse_deeply(depth, n + 1);
  frame[1] = frame[0];
}
TEST_F(ExecutorDeathTest, StackOverflow) {
  int depth;
  EXPECT_DEATH(run({.grid = 1, .block = 1}, recurse_deeply, &depth, 0),
               kAsan ? "stack-overflow|SEGV|stack" : "needs more than [0-9]+ bytes of stack");
}

// -------------------------------------------------------------------------------------- bad launches, calls

__global__ void nothing() {}
__global__ void keeps_floats(float* y) {
  __shared__ float kept[5120];  // 20 KiB
  kept[threadIdx.x] = *y;
  __syncthreads();
  *y = kept[blockDim.x - 1 - threadIdx.x];
}
TEST_F(ExecutorDeathTest, LaunchesThatNoGpuTakes) {
  EXPECT_DEATH(run({.grid = 1, .block = 1025}, nothing),
               "a block of \\(1025,1,1\\) threads cannot be launched");
  EXPECT_DEATH(run({.grid = 0, .block = 32}, nothing), "a grid of \\(0,1,1\\) blocks cannot be launched");
  EXPECT_DEATH(run({.grid = dim3(1, 65536), .block = 32}, nothing), "a grid of \\(1,65536,1\\)");
  EXPECT_DEATH(run({.grid = 1, .block = 32, .shared = 228 << 10}, nothing), "a block has at most 232448");
  float y = 1;
  run({.grid = 1, .block = 32, .shared = 28 << 10}, keeps_floats, &y);  // 48 KiB together
  EXPECT_DEATH(run({.grid = 1, .block = 32, .shared = 29 << 10}, keeps_floats, &y),
               "29696 bytes of dynamic and 20480 of static shared memory: launch\\(\\) asks");
  run({.grid = 1, .block = 32, .shared = 207 << 10}, keeps_floats, &y);
  EXPECT_DEATH(run({.grid = 1, .block = 32, .shared = 208 << 10}, keeps_floats, &y),
               "212992 bytes of dynamic and 20480 of static shared memory, a block has at most 232448");
}
}  // namespace
#endif
