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

// ---------------------------------------------------------------------------------------------------
// captures

/// Two streams and two events; page-locked, pageable and device memory.
class ExecutorCapture : public Executor {
 protected:
  ExecutorCapture() {
    EXPECT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess);
    EXPECT_EQ(cudaStreamCreateWithFlags(&other_, cudaStreamNonBlocking), cudaSuccess);
    EXPECT_EQ(cudaEventCreate(&event_), cudaSuccess);
    EXPECT_EQ(cudaEventCreate(&second_), cudaSuccess);
    EXPECT_EQ(cudaMalloc(&x_, kBytes), cudaSuccess);
    EXPECT_EQ(cudaMallocHost(&locked_, kBytes), cudaSuccess);
  }
  ~ExecutorCapture() override {
    EXPECT_EQ(cudaStreamDestroy(stream_), cudaSuccess);
    EXPECT_EQ(cudaStreamDestroy(other_), cudaSuccess);
    cudaEventDestroy(event_);
    cudaEventDestroy(second_);
    EXPECT_EQ(cudaFree(x_), cudaSuccess);
    EXPECT_EQ(cudaFreeHost(locked_), cudaSuccess);
    cudaGetLastError();
  }
  void begin(cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed) {
    ASSERT_EQ(cudaStreamBeginCapture(stream_, mode), cudaSuccess);
  }
  /// What the end of the capture says; a graph comes with success alone.
  cudaError_t end() {
    cudaGraph_t graph = nullptr;
    const cudaError_t error = cudaStreamEndCapture(stream_, &graph);
    EXPECT_EQ(graph != nullptr, error == cudaSuccess);
    if (graph != nullptr) cudaGraphDestroy(graph);
    return error;
  }
  cudaError_t copy(cudaStream_t stream, const void* from) {
    return cudaMemcpyAsync(x_, from, kBytes, cudaMemcpyHostToDevice, stream);
  }

  static constexpr size_t kBytes = 16;
  cudaStream_t stream_, other_;
  cudaEvent_t event_, second_;
  char* x_ = nullptr;
  char* locked_ = nullptr;
  char pageable_[kBytes] = {};
};

TEST_F(ExecutorCapture, WorkIsCapturedAndNothingWaits) {
  begin();
  cudaStreamCaptureStatus status;
  EXPECT_EQ(cudaStreamIsCapturing(stream_, &status), cudaSuccess);
  EXPECT_EQ(status, cudaStreamCaptureStatusActive);
  EXPECT_EQ(copy(stream_, locked_), cudaSuccess);
  EXPECT_EQ(cudaMemsetAsync(x_, 0, kBytes, stream_), cudaSuccess);
  EXPECT_EQ(cudaStreamSynchronize(other_), cudaSuccess) << "which has nothing to do with it";
  EXPECT_EQ(end(), cudaSuccess);
  EXPECT_EQ(cudaStreamIsCapturing(stream_, &status), cudaSuccess);
  EXPECT_EQ(status, cudaStreamCaptureStatusNone);
  EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
}

TEST_F(ExecutorCapture, WaitingForItSpoilsIt) {
  for (const auto wait : {cudaStreamSynchronize, cudaStreamQuery}) {
    begin();
    EXPECT_EQ(wait(stream_), cudaErrorStreamCaptureUnsupported);
    EXPECT_EQ(copy(stream_, locked_), cudaErrorStreamCaptureInvalidated);
    EXPECT_EQ(end(), cudaErrorStreamCaptureInvalidated);
  }
  begin();
  EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorStreamCaptureUnsupported);
  EXPECT_EQ(cudaStreamDestroy(stream_), cudaErrorStreamCaptureUnsupported);
  EXPECT_EQ(end(), cudaErrorStreamCaptureInvalidated);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

TEST_F(ExecutorCapture, EventsDoNotCrossItsBorders) {
  ASSERT_EQ(cudaEventRecord(event_, stream_), cudaSuccess);
  begin();
  EXPECT_EQ(cudaStreamWaitEvent(stream_, event_), cudaErrorStreamCaptureIsolation);
  EXPECT_EQ(end(), cudaErrorStreamCaptureInvalidated);
  begin();
  EXPECT_EQ(cudaEventRecord(event_, stream_), cudaSuccess);
  EXPECT_EQ(end(), cudaSuccess);
  float ms = 0;
  EXPECT_EQ(cudaEventSynchronize(event_), cudaErrorCapturedEvent);
  EXPECT_EQ(cudaEventQuery(event_), cudaErrorCapturedEvent);
  EXPECT_EQ(cudaEventElapsedTime(&ms, event_, event_), cudaErrorCapturedEvent);
  EXPECT_EQ(cudaStreamWaitEvent(other_, event_), cudaErrorCapturedEvent);
  EXPECT_EQ(cudaEventRecord(event_, stream_), cudaSuccess);
  EXPECT_EQ(cudaEventSynchronize(event_), cudaSuccess) << "recorded anew";
}

TEST_F(ExecutorCapture, PageableMemoryIsRefused) {
  EXPECT_EQ(copy(stream_, pageable_), cudaSuccess) << "outside of captures it is staged";
  begin();
  EXPECT_EQ(copy(stream_, pageable_), cudaErrorStreamCaptureUnsupported);
  EXPECT_EQ(end(), cudaErrorStreamCaptureInvalidated);
  EXPECT_EQ(cudaFreeHost(pageable_), cudaErrorInvalidValue);
}

TEST_F(ExecutorCapture, ForksMustComeBack) {
  for (const bool joins : {false, true}) {
    begin();
    EXPECT_EQ(cudaEventRecord(event_, stream_), cudaSuccess);
    EXPECT_EQ(cudaStreamWaitEvent(other_, event_), cudaSuccess);
    EXPECT_EQ(cudaStreamSynchronize(other_), cudaErrorStreamCaptureUnsupported) << "part of the capture";
    EXPECT_EQ(end(), cudaErrorStreamCaptureInvalidated);
    begin();
    EXPECT_EQ(cudaEventRecord(event_, stream_), cudaSuccess);
    EXPECT_EQ(cudaStreamWaitEvent(other_, event_), cudaSuccess);
    EXPECT_EQ(copy(other_, locked_), cudaSuccess);
    EXPECT_EQ(cudaEventRecord(second_, other_), cudaSuccess);
    if (!joins) {  // behind the event that is waited for
      EXPECT_EQ(copy(other_, locked_), cudaSuccess);
    }
    EXPECT_EQ(cudaStreamWaitEvent(stream_, second_), cudaSuccess);
    EXPECT_EQ(end(), joins ? cudaSuccess : cudaErrorStreamCaptureUnjoined);
  }
}

TEST_F(ExecutorCapture, StrictModesForbidWhatMayWait) {
  void* block = nullptr;
  for (const auto mode : {cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal}) {
    begin(mode);
    EXPECT_EQ(cudaMalloc(&block, 4), cudaErrorStreamCaptureUnsupported);
    EXPECT_EQ(cudaFree(x_), cudaErrorStreamCaptureUnsupported);
    EXPECT_EQ(cudaMallocHost(&block, 4), cudaErrorStreamCaptureUnsupported);
    EXPECT_EQ(cudaMemcpy(x_, pageable_, 4, cudaMemcpyHostToDevice), cudaErrorStreamCaptureUnsupported);
    EXPECT_EQ(cudaEventQuery(event_), cudaErrorStreamCaptureUnsupported);
    EXPECT_EQ(end(), cudaSuccess);
  }
  begin();
  EXPECT_EQ(cudaMalloc(&block, 4), cudaSuccess);
  EXPECT_EQ(cudaFree(block), cudaSuccess);
  EXPECT_EQ(end(), cudaSuccess);
}

TEST_F(ExecutorCapture, TheLegacyStreamIsNotForBlockingOnes) {
  cudaStream_t blocking;
  cudaGraph_t graph;
  ASSERT_EQ(cudaStreamCreate(&blocking), cudaSuccess);
  ASSERT_EQ(cudaStreamBeginCapture(blocking, cudaStreamCaptureModeRelaxed), cudaSuccess);
  EXPECT_EQ(copy(nullptr, locked_), cudaErrorStreamCaptureImplicit);
  EXPECT_EQ(cudaStreamSynchronize(nullptr), cudaErrorStreamCaptureImplicit);
  EXPECT_EQ(cudaStreamEndCapture(blocking, &graph), cudaSuccess);
  EXPECT_EQ(copy(nullptr, locked_), cudaSuccess);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(blocking);
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
  cudaEvent_t untimed;
  ASSERT_EQ(cudaEventCreateWithFlags(&untimed, cudaEventDisableTiming), cudaSuccess);
  EXPECT_EQ(cudaEventRecord(untimed), cudaSuccess);
  EXPECT_EQ(cudaEventElapsedTime(&ms, start, untimed), cudaErrorInvalidResourceHandle)
      << "made without times";
  for (const cudaEvent_t event : {start, end, untimed}) cudaEventDestroy(event);
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
