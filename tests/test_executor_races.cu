// The executor built with -fsanitize=thread is a race detector for kernels: it reports both lines of each
// race that is planted here, whatever values come out, and nothing for the same kernels without the bug.
// Empty in other builds.
//
//   OMP_NUM_THREADS=1 .../tests/all --gtest_filter='ExecutorRaces.*:Wrappers.*:Hopper.*'
//
// exits with status 66 when any kernel that should be clean is not.
#if defined(CUDA_ON_CPU) && defined(__SANITIZE_THREAD__)
#include <gtest/gtest.h>

#include "model/kernels/hopper.h"

namespace {
/// Runs a kernel of one block in a fresh process, which then exits: with 66 after a report.
template <typename... Parameters, typename... Arguments>
[[noreturn]] void run_and_exit(unsigned threads, void (*kernel)(Parameters...), Arguments... arguments) {
  cuda_on_cpu::run(
      1, threads, 48 << 10, [&] { kernel(static_cast<Parameters>(arguments)...); },
      reinterpret_cast<const void*>(kernel));
  std::exit(0);
}
constexpr int kClean = 0, kRace = 66;

class ExecutorRaces : public testing::Test {
 protected:
  ExecutorRaces() { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
  alignas(16) float x[1024] = {}, y[1024] = {};
};

#define EXPECT_CLEAN(...) EXPECT_EXIT(run_and_exit(__VA_ARGS__), testing::ExitedWithCode(kClean), "")
#define EXPECT_RACE(in, ...) \
  EXPECT_EXIT(run_and_exit(__VA_ARGS__), testing::ExitedWithCode(kRace), "data race(.|\n)*" in "(.|\n)*" in)

// ------------------------------------------------------------------------------------------- block barriers

template <bool kForget>
__global__ void read_after_write(float* y) {
  __shared__ float tile[64];
  tile[threadIdx.x] = 1;
  if (!kForget) __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x ^ 32];
}
TEST_F(ExecutorRaces, ReadAfterWriteWithoutBarrier) {
  EXPECT_CLEAN(64, read_after_write<false>, y);
  EXPECT_RACE("read_after_write", 64, read_after_write<true>, y);
}

/// The race is between one round's reads and the next round's writes: to see it, what a fast thread does
/// after a barrier must not count as ordered before what a slow one does.
template <bool kForget>
__global__ void write_after_read(float* y) {
  __shared__ float tile[64];
  float mine = 0;
  for (int round = 0; round < 3; ++round) {
    tile[threadIdx.x] = mine;
    __syncthreads();
    mine += tile[threadIdx.x ^ 32];
    if (!kForget) __syncthreads();
  }
  y[threadIdx.x] = mine;
}
TEST_F(ExecutorRaces, WriteAfterReadWithoutBarrier) {
  EXPECT_CLEAN(64, write_after_read<false>, y);
  EXPECT_RACE("write_after_read", 64, write_after_read<true>, y);
}

template <int kThreads>
__global__ void named(float* y) {
  DYN_SHARED(float, tile);
  tile[threadIdx.x] = 1;
  named_barrier(1 + static_cast<int>(threadIdx.x) / kThreads, kThreads);
  y[threadIdx.x] = tile[threadIdx.x ^ 32];
}
TEST_F(ExecutorRaces, NamedBarrierOrdersThoseWhoShareItOnly) {
  EXPECT_CLEAN(128, named<64>, y);
  EXPECT_RACE("named", 128, named<32>, y);
}

// ---------------------------------------------------------------------------------------------------- warps

/// A shuffle is no memory barrier.
template <bool kForget>
__global__ void shuffle_instead_of_syncwarp(float* y) {
  DYN_SHARED(float, tile);
  tile[threadIdx.x] = __shfl_xor_sync(kFullMask, 1.0f, 1);
  if (!kForget) __syncwarp();
  const float unused = __shfl_xor_sync(kFullMask, 1.0f, 1);
  y[threadIdx.x] = tile[threadIdx.x ^ 1] + unused;
}
TEST_F(ExecutorRaces, ShuffleDoesNotOrderMemory) {
  EXPECT_CLEAN(32, shuffle_instead_of_syncwarp<false>, y);
  EXPECT_RACE("shuffle_instead_of_syncwarp", 32, shuffle_instead_of_syncwarp<true>, y);
}

/// Threads that never wait are as concurrent as others.
template <bool kAtomic>
__global__ void count(float* y) {
  if (kAtomic)
    atomicAdd(y, 1.0f);
  else
    *y += 1;
}
TEST_F(ExecutorRaces, PlainIncrementOfOneVariable) {
  EXPECT_CLEAN(32, count<true>, y);
  EXPECT_RACE("count", 32, count<false>, y);
}

// -------------------------------------------------------------------------------------- asynchronous copies

/// Refills a tile that another warp may still be reading with ldmatrix.
template <bool kForget>
__global__ void refill(float* y, const float* x) {
  DYN_SHARED(float, tile);
  const int t = static_cast<int>(threadIdx.x);
  uint32_t r[4];
  for (int round = 0; round < 2; ++round) {
    cp_async16(tile + 4 * t, x + 4 * t);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    ldmatrix_x4(r, tile + (t ^ 32) * 4);
    if (!kForget) __syncthreads();
  }
  y[t] = __uint_as_float(r[0]);
}
TEST_F(ExecutorRaces, CopyIntoATileThatIsBeingRead) {
  EXPECT_CLEAN(64, refill<false>, y, x);
  EXPECT_RACE("refill", 64, refill<true>, y, x);
}

template <bool kForget>
__global__ void refill_by_tma(float* y, TensorMap map) {
  DYN_SHARED(bf16, tile);
  auto* full = reinterpret_cast<uint64_t*>(tile + 8 * 64);
  uint64_t* empty = full + 1;
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, 32);
    mbarrier_fence_init();
  }
  __syncthreads();
  for (int round = 0; round < 3; ++round) {
    if (t == 32) {
      if (!kForget) mbarrier_wait(empty, 1 - round % 2);
      mbarrier_arrive_expect(full, 8 * 128);
      tma_load(tile, map, full, 0, 0);
      if (kForget) mbarrier_wait(full, round % 2);
    } else if (t < 32) {
      mbarrier_wait(full, round % 2);
      y[t] = to_float(tile[t]);
      mbarrier_arrive(empty);
    }
  }
}
TEST_F(ExecutorRaces, TmaIntoATileThatIsBeingRead) {
  const TensorMap map = tensor_map(reinterpret_cast<const bf16*>(x), 8, 64, 8);
  EXPECT_CLEAN(64, refill_by_tma<false>, y, map);
  EXPECT_RACE("refill_by_tma", 64, refill_by_tma<true>, y, map);
}
}  // namespace
#endif
