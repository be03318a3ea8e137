// The executor's runtime, number formats and schedules (dev/cuda_on_cpu).
#ifdef CUDA_ON_CPU
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "model/kernels/cuda.h"
#include "tests/thread_orders.h"

namespace {
template <typename... Parameters, typename... Arguments>
void run(const Launch& how, void (*kernel)(Parameters...), Arguments... arguments) {
  cuda_on_cpu::run(how.grid, how.block, how.shared, [&] { kernel(static_cast<Parameters>(arguments)...); });
}

class Executor : public testing::Test {
 protected:
  ~Executor() override { cuda_on_cpu::set_order("forward"); }
};

__global__ void write_one(float* y) {
  *y = 1;
}

TEST_F(Executor, CopiesAreChecked) {
  void* block = nullptr;
  ASSERT_EQ(cudaMalloc(&block, 64 * sizeof(float)), cudaSuccess);
  float* y = static_cast<float*>(block);
  float x[65] = {};
  EXPECT_EQ(cudaMemcpy(y, x, 65 * 4, cudaMemcpyHostToDevice), cudaErrorInvalidValue) << "too long";
  EXPECT_EQ(cudaMemcpy(y, x, 4, cudaMemcpyDeviceToHost), cudaErrorInvalidValue) << "wrong way round";
  EXPECT_EQ(cudaMemset(x, 0, 4), cudaErrorInvalidValue) << "host memory";
  EXPECT_STREQ(cudaGetErrorName(cudaGetLastError()), "cudaErrorInvalidValue");
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  EXPECT_EQ(cudaFree(y + 1), cudaErrorInvalidValue);
  EXPECT_EQ(cudaFree(y), cudaSuccess);
  EXPECT_EQ(cudaFree(y), cudaErrorInvalidValue) << "freed twice";
  void* too_much = nullptr;
  EXPECT_EQ(cudaMalloc(&too_much, size_t{1} << 40), cudaErrorMemoryAllocation);
}

TEST_F(Executor, GraphsRunOnceWhileTheyAreCaptured) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
  float y = 0;
  run({.grid = 1, .block = 1}, write_one, &y);
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&executable, graph), cudaSuccess);
  EXPECT_EQ(cudaGraphLaunch(executable, stream), cudaSuccess);
  EXPECT_EQ(y, 1);
  EXPECT_EQ(cudaGraphLaunch(executable, stream), cudaErrorNotSupported);
  cudaGraphExecUpdateResultInfo info;
  EXPECT_EQ(cudaGraphExecUpdate(executable, graph, &info), cudaSuccess);
  EXPECT_EQ(cudaGraphLaunch(executable, stream), cudaSuccess);
  cudaGraphDestroy(graph);
  cudaGraphExecDestroy(executable);
  cudaStreamDestroy(stream);
  cudaGetLastError();
}

/// Against a search among all values of the format, in float64; beyond the largest comes what would follow
/// it.
void check_fp8(__nv_fp8_interpretation_t kind, double largest, double next, int overflow, double smallest) {
  const auto value = [&](int bits) {
    return kind == __NV_E4M3 ? static_cast<float>(std::bit_cast<__nv_fp8_e4m3>(static_cast<uint8_t>(bits)))
                             : static_cast<float>(std::bit_cast<__nv_fp8_e5m2>(static_cast<uint8_t>(bits)));
  };
  int top = 0;
  while (value(top) != largest) ++top;
  EXPECT_EQ(value(1), smallest);
  EXPECT_EQ(value(0), 0);
  std::vector<float> tries{0, 1e-30f, 1e30f, INFINITY};
  for (int bits = 0; bits <= top; ++bits) {
    const double here = value(bits), after = bits == top ? next : value(bits + 1);
    for (double at : {here, (here + after) / 2}) {
      const auto x = static_cast<float>(at);
      tries.insert(tries.end(), {x, std::nextafterf(x, INFINITY), std::nextafterf(x, 0)});
    }
  }
  for (float x : tries) {
    int want = 0;  // the nearest; of two the even one
    for (int bits = 0; bits <= top + 1; ++bits) {
      const double far = std::abs(x - (bits > top ? next : value(bits))),
                   best = std::abs(x - (want > top ? next : value(want)));
      if (far < best || (far == best && bits % 2 == 0)) want = bits;
    }
    const bool too_large = x >= next || want > top;
    for (int sign : {0, 0x80}) {
      const float signed_x = sign != 0 ? -x : x;
      EXPECT_EQ(__nv_cvt_float_to_fp8(signed_x, __NV_SATFINITE, kind), sign | (too_large ? top : want))
          << signed_x;
      EXPECT_EQ(__nv_cvt_float_to_fp8(signed_x, __NV_NOSAT, kind), sign | (too_large ? overflow : want))
          << signed_x;
    }
  }
  EXPECT_EQ(__nv_cvt_float_to_fp8(NAN, __NV_SATFINITE, kind), 0x7f);
}
TEST_F(Executor, Fp8RoundsToNearestEven) {
  check_fp8(__NV_E4M3, 448, 480, 0x7f, 0x1p-9);
  check_fp8(__NV_E5M2, 57344, 65536, 0x7c, 0x1p-16);
}

TEST_F(Executor, EventsMeasureTime) {
  cudaEvent_t start, end;
  ASSERT_EQ(cudaEventCreate(&start), cudaSuccess);
  ASSERT_EQ(cudaEventCreate(&end), cudaSuccess);
  float ms = -1;
  EXPECT_EQ(cudaEventElapsedTime(&ms, start, end), cudaErrorInvalidResourceHandle) << "not recorded";
  EXPECT_EQ(cudaEventRecord(start), cudaSuccess);
  EXPECT_EQ(cudaEventRecord(end), cudaSuccess);
  EXPECT_EQ(cudaEventElapsedTime(&ms, start, end), cudaSuccess);
  EXPECT_GE(ms, 0);
  cudaEventDestroy(start);
  cudaEventDestroy(end);
  cudaGetLastError();
}

// ------------------------------------------------------------------------------------------------ schedules

__global__ void record_order(int* order, int* next) {
  order[atomicAdd(next, 1)] = static_cast<int>(threadIdx.x);
}
TEST_F(Executor, OrdersAreWhatTheySay) {
  const auto first_two = [](const char* order) {
    cuda_on_cpu::set_order(order);
    std::vector<int> seen(64);
    int next = 0;
    run({.grid = 1, .block = 64}, record_order, seen.data(), &next);
    std::vector<int> sorted = seen;
    std::sort(sorted.begin(), sorted.end());
    for (int i = 0; i < 64; ++i) EXPECT_EQ(sorted[static_cast<size_t>(i)], i) << order;
    return seen;
  };
  EXPECT_EQ(first_two("forward")[1], 1);
  EXPECT_EQ(first_two("reverse")[1], 62);
  EXPECT_NE(first_two("random:1"), first_two("random:2"));
  EXPECT_EQ(first_two("random:3"), first_two("random:3"));
  EXPECT_THROW(cuda_on_cpu::set_order("sideways"), std::invalid_argument);
}

__global__ void count_blocks(int* seen) {
  if (threadIdx.x == 0) seen[blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z)] += 1;
  __syncthreads();
}
TEST_F(Executor, EveryBlockRunsOnce) {
  for_each_thread_order([](const std::string& order) {
    std::vector<int> seen(7 * 5 * 3);
    run({.grid = dim3(7, 5, 3), .block = 64}, count_blocks, seen.data());
    EXPECT_EQ(seen, std::vector<int>(7 * 5 * 3, 1)) << order;
  });
}
}  // namespace
#endif
