// The wrappers of hopper.h element by element, bugs that the executor catches in kernels which use them, and
// the matrix product of dev/lab that does.
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "dev/lab/gemm_wgmma.h"
#include "model/kernels/hopper.h"
#include "tests/device_array.h"
#include "tests/thread_orders.h"

namespace {
class Hopper : public testing::Test {
 protected:
  Hopper() { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
  void SetUp() override {
    Context ctx;
    use_gpu(ctx, 0, DType::f32);
    if (ctx.device->compute_capability != 90) GTEST_SKIP() << "needs compute capability 9.0";
  }
};
using HopperBugs = Hopper;
using HopperDeathTest = Hopper;

std::vector<bf16> integers(size_t count, int modulo, int shift) {
  std::vector<bf16> x;
  for (size_t i = 0; i < count; ++i)
    x.push_back(static_cast<float>(static_cast<int>(i * 7 % static_cast<size_t>(modulo)) - shift));
  return x;
}

// ------------------------------------------------------------------------------------------------------ TMA

enum class Bug { none, no_wait, no_announcement, no_fence, no_wgmma_wait };

/// Loads a box of 16 rows and writes what lies in shared memory, in order of addresses.
template <Bug kBug>
__global__ void load_box(bf16* out, const __grid_constant__ TensorMap map, int row, int col) {
#if HOPPER_CODE
  DYN_SHARED(bf16, tile);
  auto* barrier = reinterpret_cast<uint64_t*>(tile + 16 * 64);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_fence_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, kBug == Bug::no_announcement ? 16 * 128 - 2 : 16 * 128);
    tma_load(tile, map, barrier, row, col);
  }
  if (kBug != Bug::no_wait) mbarrier_wait(barrier, 0);
  for (int i = static_cast<int>(threadIdx.x); i < 16 * 64; i += 32) out[i] = tile[i];
  if (kBug == Bug::no_wait) mbarrier_wait(barrier, 0);
#endif
}

constexpr int kRows = 40, kCols = 72;
template <Bug kBug>
std::vector<bf16> loaded_box(int row, int col) {
  const std::vector<bf16> x = integers(kRows * kCols, 251, 0);
  const DeviceArray<bf16> from(x), to(16 * 64);
  run_kernel({.grid = 1, .block = 32, .shared = 16 * 128 + 8}, load_box<kBug>, to.data(),
             tensor_map(from.data(), kRows, kCols, 16), row, col);
  return to.values();
}

TEST_F(Hopper, TmaLoadsSwizzledBoxesAndZerosOutside) {
  const std::vector<bf16> x = integers(kRows * kCols, 251, 0);
  for (const auto& [row, col] : {std::pair(0, 0), {8, 8}, {32, 64}, {-3, -5}, {100, 0}})
    for_each_thread_order([&, row = row, col = col](const std::string& order) {
      const std::vector<bf16> got = loaded_box<Bug::none>(row, col);
      for (int r = 0; r < 16; ++r)
        for (int c = 0; c < 64; ++c) {
          const bool inside = row + r >= 0 && row + r < kRows && col + c >= 0 && col + c < kCols;
          const float want =
              inside ? static_cast<float>(x[static_cast<size_t>((row + r) * kCols + col + c)]) : 0;
          // chunk c / 8 of row r is at chunk c / 8 ^ r % 8
          const int at = r * 64 + ((c / 8) ^ (r % 8)) * 8 + c % 8;
          ASSERT_EQ(static_cast<float>(got[static_cast<size_t>(at)]), want)
              << order << ", box " << row << "," << col << " element " << r << "," << c;
        }
    });
}

// ------------------------------------------------------------------------------------------------ mbarriers

/// Two warps pass a value to and fro through phases of both parities.
__global__ void ping_pong(int* out) {
#if HOPPER_CODE
  DYN_SHARED(uint64_t, barriers);
  auto* value = reinterpret_cast<volatile int*>(barriers + 2);
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0) {
    mbarrier_init(&barriers[0], 32);
    mbarrier_init(&barriers[1], 32);
    mbarrier_fence_init();
    *value = 0;
  }
  __syncthreads();
  for (int round = 0; round < 6; ++round) {
    const int parity = round % 2;
    if (t < 32) {
      mbarrier_wait(&barriers[1], 1 - parity);  // passes at once in round 0
      if (t == 0) *value = *value + 1;
      mbarrier_arrive(&barriers[0]);
    } else {
      mbarrier_wait(&barriers[0], parity);
      if (t == 32) *value = *value * 2;
      mbarrier_arrive(&barriers[1]);
    }
  }
  __syncthreads();
  if (t == 0) out[0] = *value;
#endif
}
TEST_F(Hopper, MbarriersHandOverInBothDirections) {
  for_each_thread_order([](const std::string& order) {
    const DeviceArray<int> out(1);
    run_kernel({.grid = 1, .block = 64, .shared = 64}, ping_pong, out.data());
    EXPECT_EQ(out.values()[0], 126) << order;  // x -> 2 (x + 1), six times
  });
}

// ---------------------------------------------------------------------------------------------------- wgmma

/// d (64, N) = 2 a b^T, a (64, 64), b (N, 64): all columns twice.
template <int N, Bug kBug>
__global__ void multiply_tiles(float* d, const __grid_constant__ TensorMap a,
                               const __grid_constant__ TensorMap b) {
#if HOPPER_CODE
  DYN_SHARED(bf16, tiles);
  auto* barrier = reinterpret_cast<uint64_t*>(tiles + (64 + N) * 64);
  const int t = static_cast<int>(threadIdx.x), lane = t % 32, warp = t / 32;
  if (t == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_fence_init();
    mbarrier_arrive_expect(barrier, (64 + N) * 128);
    tma_load(tiles, a, barrier, 0, 0);
    tma_load(tiles + 64 * 64, b, barrier, 0, 0);
  }
  __syncthreads();
  mbarrier_wait(barrier, 0);
  float sums[N / 2] = {};
  if (kBug != Bug::no_fence) wgmma_fence();
  for (int twice = 0; twice < 2; ++twice) {
    for (int k = 0; k < 4; ++k)
      wgmma_k16<N>(sums, wgmma_descriptor(tiles) + 2 * k, wgmma_descriptor(tiles + 64 * 64) + 2 * k);
    wgmma_commit();
  }
  if (kBug == Bug::no_wgmma_wait)
    wgmma_wait<1>();
  else
    wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i)
    d[(warp * 16 + lane / 4 + i / 2 % 2 * 8) * N + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i];
  wgmma_wait<0>();
#endif
}

template <int N, Bug kBug>
std::vector<float> multiplied_tiles(const std::vector<bf16>& a, const std::vector<bf16>& b) {
  const DeviceArray<bf16> device_a(a), device_b(b);
  const DeviceArray<float> d(64 * N);
  run_kernel({.grid = 1, .block = 128, .shared = (64 + N) * 128 + 8}, multiply_tiles<N, kBug>, d.data(),
             tensor_map(device_a.data(), 64, 64, 64), tensor_map(device_b.data(), N, 64, N));
  return d.values();
}

template <int N>
void check_wgmma() {
  const std::vector<bf16> a = integers(64 * 64, 127, 60), b = integers(N * 64, 61, 30);
  for_each_thread_order([&](const std::string& order) {
    const std::vector<float> d = multiplied_tiles<N, Bug::none>(a, b);
    for (size_t row = 0; row < 64; ++row)
      for (size_t col = 0; col < N; ++col) {
        float want = 0;
        for (size_t k = 0; k < 64; ++k)
          want += 2 * static_cast<float>(a[row * 64 + k]) * static_cast<float>(b[col * 64 + k]);
        ASSERT_EQ(d[row * N + col], want) << order << ", " << row << "," << col;
      }
  });
}
TEST_F(Hopper, WgmmaM64N64) {
  check_wgmma<64>();
}
TEST_F(Hopper, WgmmaM64N128) {
  check_wgmma<128>();
}
TEST_F(Hopper, WgmmaM64N256) {
  check_wgmma<256>();
}

// ----------------------------------------------------------------------- what the executor catches of these
#ifdef CUDA_ON_CPU

TEST_F(HopperBugs, ReadingBeforeTheCopyHasArrivedGivesNan) {
  for_each_thread_order([](const std::string& order) {
    EXPECT_TRUE(std::isnan(static_cast<float>(loaded_box<Bug::no_wait>(0, 0)[0]))) << order;
  });
}
TEST_F(HopperDeathTest, WrongNumberOfAnnouncedBytes) {
  EXPECT_DEATH(loaded_box<Bug::no_announcement>(0, 0),
               "threads 0 to 31 wait in mbarrier_wait \\(test_hopper.cu:[0-9]+\\), phase 0 lacks 0 of 1 "
               "arrivals and -2 bytes");
}
TEST_F(HopperBugs, ReadingSumsBeforeTheirWaitGivesNan) {
  const std::vector<bf16> a = integers(64 * 64, 127, 60), b = integers(64 * 64, 61, 30);
  for_each_thread_order([&](const std::string& order) {
    const std::vector<float> d = multiplied_tiles<64, Bug::no_wgmma_wait>(a, b);
    for (float x : d) ASSERT_TRUE(std::isnan(x)) << order;
  });
}
TEST_F(HopperDeathTest, WgmmaWithoutFence) {
  const std::vector<bf16> a = integers(64 * 64, 127, 60), b = a;
  EXPECT_DEATH((multiplied_tiles<64, Bug::no_fence>(a, b)), "wgmma without a wgmma_fence before");
}

__global__ void misplaced_barrier(int kind) {
  DYN_SHARED(uint64_t, barriers);
  if (kind == 0) mbarrier_arrive(&barriers[0]);
  if (kind == 1) {
    mbarrier_init(&barriers[0], 2);
    mbarrier_wait(&barriers[0], 0);
  }
}
TEST_F(HopperDeathTest, MisusedMbarriers) {
  EXPECT_DEATH(run_kernel({.grid = 1, .block = 1, .shared = 64}, misplaced_barrier, 0),
               "used before mbarrier_init");
  EXPECT_DEATH(run_kernel({.grid = 1, .block = 1, .shared = 64}, misplaced_barrier, 1),
               "phase 0 lacks 2 of 2 arrivals and 0 bytes");
}
#endif

// ----------------------------------------------------------------------------------- the product of dev/lab

struct GemmCase {
  int64_t M, N, K;
  bool bias = false;
  float alpha = 1, beta = 0;
};

/// Small integers: products and sums are exact in float32, so every element must be right to the last bit.
template <typename T>
std::vector<T> small_integers(int64_t count, int modulo) {
  std::vector<T> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(static_cast<float>(i * 31 % modulo - modulo / 2));
  return values;
}

/// With c of type T.
template <typename T>
void check_gemm(const GemmCase& c) {
  const auto a = small_integers<bf16>(c.M * c.K, 17), b = small_integers<bf16>(c.N * c.K, 13);
  const auto bias = small_integers<T>(c.N, 11), before = small_integers<T>(c.M * c.N, 7);
  const DeviceArray<bf16> device_a(a), device_b(b);
  const DeviceArray<T> device_bias(bias), device_c(before);
  const Tensor bias_tensor{device_bias.data(), dtype_of<T>(), {c.N}};
  Context ctx;
  use_gpu(ctx, 0, DType::bf16);
  lab_gemm_wgmma(ctx, {.c = {device_c.data(), dtype_of<T>(), {c.M, c.N}},
                       .a = {device_a.data(), DType::bf16, {c.M, c.K}},
                       .b = {device_b.data(), DType::bf16, {c.N, c.K}},
                       .bias = c.bias ? bias_tensor : Tensor{},
                       .transpose_b = true,
                       .alpha = c.alpha,
                       .beta = c.beta});
  gpu::synchronize(*ctx.device);
  const std::vector<T> got = device_c.values();
  for (int64_t m = 0; m < c.M; ++m)
    for (int64_t n = 0; n < c.N; ++n) {
      float sum = 0;
      for (int64_t k = 0; k < c.K; ++k)
        sum += static_cast<float>(a[static_cast<size_t>(m * c.K + k)]) *
               static_cast<float>(b[static_cast<size_t>(n * c.K + k)]);
      const auto at = static_cast<size_t>(m * c.N + n);
      const float want = c.alpha * sum + (c.bias ? static_cast<float>(bias[static_cast<size_t>(n)]) : 0) +
                         c.beta * static_cast<float>(before[at]);
      ASSERT_EQ(static_cast<float>(got[at]), static_cast<float>(static_cast<T>(want))) << m << "," << n;
    }
}

TEST_F(Hopper, GemmOfDevLab) {
  for_each_thread_order([](const std::string& order) {
    SCOPED_TRACE(order);
    check_gemm<float>({.M = 128, .N = 128, .K = 320});
    check_gemm<bf16>({.M = 200, .N = 77, .K = 72, .bias = true, .alpha = 2, .beta = 1});
    check_gemm<bf16>({.M = 131, .N = 256, .K = 136, .bias = true});
    check_gemm<float>({.M = 64, .N = 512, .K = 8, .alpha = 0.5f, .beta = 3});
  });
}
TEST_F(Hopper, GemmOfDevLabRefusesWhatItCannotDo) {
  EXPECT_THROW(check_gemm<float>({.M = 64, .N = 64, .K = 36}), ShapeError);
}
}  // namespace
