// The executor's streams (dev/cuda_on_cpu/queue.h): what programs get wrong between streams and the host
// shows when work comes late, and what they get right comes out right whenever it is done.
#ifdef CUDA_ON_CPU
#include <gtest/gtest.h>

#include <stdexcept>
#include <vector>

#include "dev/cuda_on_cpu/queue.h"
#include "model/kernels/cuda.h"

namespace {
constexpr int kCount = 100;
constexpr size_t kBytes = kCount * sizeof(float);

__global__ void add(float* x, float by) {
  x[threadIdx.x] += by;
}

/// Two streams that know nothing of the legacy one, an event, device memory, page-locked memory.
class ExecutorStreams : public testing::Test {
 protected:
  ExecutorStreams() {
    EXPECT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess);
    EXPECT_EQ(cudaStreamCreateWithFlags(&other_, cudaStreamNonBlocking), cudaSuccess);
    EXPECT_EQ(cudaEventCreate(&event_), cudaSuccess);
    EXPECT_EQ(cudaMalloc(&x_, kBytes), cudaSuccess);
    EXPECT_EQ(cudaMallocHost(&host_, kBytes), cudaSuccess);
    fill(1);
  }
  ~ExecutorStreams() override {
    cudaStreamDestroy(stream_);
    cudaStreamDestroy(other_);
    cudaEventDestroy(event_);
    cudaFree(x_);
    cudaFreeHost(host_);
    cuda_on_cpu::set_streams(before_);
    cudaGetLastError();
  }
  void fill(float value) { std::fill_n(host_, kCount, value); }
  void upload(cudaStream_t stream) {
    EXPECT_EQ(cudaMemcpyAsync(x_, host_, kBytes, cudaMemcpyHostToDevice, stream), cudaSuccess);
  }
  void download(cudaStream_t stream) {
    EXPECT_EQ(cudaMemcpyAsync(host_, x_, kBytes, cudaMemcpyDeviceToHost, stream), cudaSuccess);
  }
  void enqueue_add(cudaStream_t stream, float by) {
    float* x = x_;
    EXPECT_EQ(
        cuda_on_cpu::enqueue("launch", stream, [=] { cuda_on_cpu::run(1, kCount, 0, [=] { add(x, by); }); }),
        cudaSuccess);
  }
  /// What the host has when all is over.
  std::vector<float> host_after_all() {
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    return {host_, host_ + kCount};
  }

  const std::string before_ = cuda_on_cpu::set_streams("eager");
  cudaStream_t stream_ = nullptr, other_ = nullptr;
  cudaEvent_t event_ = nullptr;
  float *x_ = nullptr, *host_ = nullptr;
};

std::vector<float> all(float value) {
  return std::vector<float>(kCount, value);
}

TEST_F(ExecutorStreams, WhatWaitsRightIsRightWhenever) {
  for (const char* when : {"eager", "late", "random:1", "random:2", "random:3"}) {
    cuda_on_cpu::set_streams(when);
    fill(1);
    upload(other_);
    EXPECT_EQ(cudaEventRecord(event_, other_), cudaSuccess);
    EXPECT_EQ(cudaStreamWaitEvent(stream_, event_), cudaSuccess);
    enqueue_add(stream_, 2);
    download(stream_);
    EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
    EXPECT_EQ(std::vector<float>(host_, host_ + kCount), all(3)) << when;
  }
}

TEST_F(ExecutorStreams, AMissingWaitBetweenStreamsShows) {
  cuda_on_cpu::set_streams("late");
  upload(other_);
  enqueue_add(stream_, 2);  // of what is not there yet
  download(stream_);
  EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
  EXPECT_TRUE(std::isnan(host_[0]));
}

TEST_F(ExecutorStreams, AMissingWaitShowsForSomeSeed) {
  int wrong = 0;
  for (int seed = 0; seed < 20; ++seed) {
    cuda_on_cpu::set_streams("random:" + std::to_string(seed));
    fill(1);
    upload(other_);
    enqueue_add(stream_, 2);
    download(stream_);
    EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
    if (host_[0] != 3) ++wrong;
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  }
  EXPECT_GT(wrong, 0);
  EXPECT_LT(wrong, 20);
}

TEST_F(ExecutorStreams, ABufferThatIsRefilledTooSoonShows) {
  cuda_on_cpu::set_streams("late");
  upload(stream_);
  fill(5);
  download(stream_);
  EXPECT_EQ(host_after_all(), all(5));
}

TEST_F(ExecutorStreams, AResultThatIsReadTooSoonShows) {
  cuda_on_cpu::set_streams("late");
  upload(stream_);
  enqueue_add(stream_, 2);
  download(stream_);
  EXPECT_EQ(host_[0], 1);
  EXPECT_EQ(host_after_all(), all(3));
}

TEST_F(ExecutorStreams, PageableMemoryIsReadAndWrittenByTheCall) {
  cuda_on_cpu::set_streams("late");
  std::vector<float> pageable = all(1);
  EXPECT_EQ(cudaMemcpyAsync(x_, pageable.data(), kBytes, cudaMemcpyHostToDevice, stream_), cudaSuccess);
  pageable = all(7);
  enqueue_add(stream_, 2);
  EXPECT_EQ(cudaMemcpyAsync(pageable.data(), x_, kBytes, cudaMemcpyDeviceToHost, stream_), cudaSuccess);
  EXPECT_EQ(pageable, all(3));
}

TEST_F(ExecutorStreams, TheLegacyStreamWaitsForBlockingOnesAlone) {
  cuda_on_cpu::set_streams("late");
  cudaStream_t blocking = nullptr;
  ASSERT_EQ(cudaStreamCreate(&blocking), cudaSuccess);
  float now = 0;
  for (const cudaStream_t stream : {blocking, stream_}) {
    upload(stream);
    enqueue_add(stream, 2);
    EXPECT_EQ(cudaMemcpy(&now, x_, sizeof now, cudaMemcpyDeviceToHost), cudaSuccess);
    EXPECT_EQ(now, 3) << "of the first stream, and not yet of the second";
    fill(10);
  }
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(cudaMemcpy(&now, x_, sizeof now, cudaMemcpyDeviceToHost), cudaSuccess);
  EXPECT_EQ(now, 12);
  EXPECT_EQ(cudaStreamDestroy(blocking), cudaSuccess);
}

TEST_F(ExecutorStreams, QuestionsBringWorkOnATask) {
  cuda_on_cpu::set_streams("late");
  upload(stream_);
  enqueue_add(stream_, 2);
  EXPECT_EQ(cudaEventRecord(event_, stream_), cudaSuccess);
  download(stream_);
  EXPECT_EQ(cudaEventQuery(event_), cudaErrorNotReady);
  EXPECT_EQ(cudaEventQuery(event_), cudaErrorNotReady);
  EXPECT_EQ(cudaEventQuery(event_), cudaSuccess);
  EXPECT_EQ(cudaEventQuery(event_), cudaSuccess) << "and nothing behind it";
  EXPECT_EQ(host_[0], 1);
  EXPECT_EQ(cudaStreamQuery(stream_), cudaSuccess);
  EXPECT_EQ(host_[0], 3);
  EXPECT_EQ(cudaStreamQuery(stream_), cudaSuccess) << "nothing left";
  EXPECT_EQ(cudaGetLastError(), cudaSuccess) << "not being ready is no failure";
}

TEST_F(ExecutorStreams, AWaitIsForTheRecordOfItsTime) {
  cuda_on_cpu::set_streams("late");
  upload(other_);
  EXPECT_EQ(cudaEventRecord(event_, other_), cudaSuccess);
  EXPECT_EQ(cudaStreamWaitEvent(stream_, event_), cudaSuccess);
  download(stream_);
  enqueue_add(other_, 2);
  EXPECT_EQ(cudaEventRecord(event_, other_), cudaSuccess);
  EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
  EXPECT_EQ(host_[0], 1);
  float ms = 0;
  EXPECT_EQ(cudaEventElapsedTime(&ms, event_, event_), cudaErrorNotReady);
  EXPECT_EQ(cudaEventSynchronize(event_), cudaSuccess);
  EXPECT_EQ(cudaEventElapsedTime(&ms, event_, event_), cudaSuccess);
}

TEST_F(ExecutorStreams, FreeingFinishes) {
  cuda_on_cpu::set_streams("late");
  float* pinned = nullptr;
  ASSERT_EQ(cudaMallocHost(&pinned, kBytes), cudaSuccess);
  std::fill_n(pinned, kCount, 4.0f);
  EXPECT_EQ(cudaMemcpyAsync(x_, pinned, kBytes, cudaMemcpyHostToDevice, stream_), cudaSuccess);
  EXPECT_EQ(cudaFreeHost(pinned), cudaSuccess);
  download(other_);
  EXPECT_EQ(host_after_all(), all(4));
}

TEST_F(ExecutorStreams, AGraphIsWhatWasEnqueuedAndRunsWhenItIsLaunched) {
  for (const char* when : {"eager", "late"}) {
    cuda_on_cpu::set_streams(when);
    fill(1);
    upload(stream_);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    float by = 2;
    const auto capture = [&](int times) {
      ASSERT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed), cudaSuccess);
      for (int i = 0; i < times; ++i) enqueue_add(stream_, by);
      ASSERT_EQ(cudaStreamEndCapture(stream_, &graph), cudaSuccess);
    };
    const auto launch = [&] { EXPECT_EQ(cudaGraphLaunch(executable, stream_), cudaSuccess); };
    capture(1);
    ASSERT_EQ(cudaGraphInstantiate(&executable, graph), cudaSuccess);
    cudaGraphDestroy(graph);
    by = 100;  // too late for the graph
    launch();
    launch();
    capture(1);
    cudaGraphExecUpdateResultInfo info{};
    EXPECT_EQ(cudaGraphExecUpdate(executable, graph, &info), cudaSuccess);
    EXPECT_EQ(info.result, cudaGraphExecUpdateSuccess);
    cudaGraphDestroy(graph);
    launch();
    capture(2);
    EXPECT_EQ(cudaGraphExecUpdate(executable, graph, &info), cudaErrorGraphExecUpdateFailure);
    EXPECT_EQ(info.result, cudaGraphExecUpdateErrorTopologyChanged);
    cudaGraphDestroy(graph);
    cudaGraphExecDestroy(executable);  // its launches stay
    download(stream_);
    EXPECT_EQ(host_after_all(), all(1 + 2 + 2 + 100)) << when;
  }
}

TEST_F(ExecutorStreams, CapturedForksRunInTheOrderOfTheCalls) {
  cuda_on_cpu::set_streams("late");
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  ASSERT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed), cudaSuccess);
  upload(stream_);
  EXPECT_EQ(cudaEventRecord(event_, stream_), cudaSuccess);
  EXPECT_EQ(cudaStreamWaitEvent(other_, event_), cudaSuccess);
  enqueue_add(other_, 2);
  cudaGraph_t none = nullptr;
  EXPECT_EQ(cudaStreamEndCapture(stream_, &none), cudaErrorStreamCaptureUnjoined) << "a kernel is work, too";
  ASSERT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed), cudaSuccess);
  upload(stream_);
  EXPECT_EQ(cudaEventRecord(event_, stream_), cudaSuccess);
  EXPECT_EQ(cudaStreamWaitEvent(other_, event_), cudaSuccess);
  enqueue_add(other_, 2);
  EXPECT_EQ(cudaEventRecord(event_, other_), cudaSuccess);
  EXPECT_EQ(cudaStreamWaitEvent(stream_, event_), cudaSuccess);
  download(stream_);
  ASSERT_EQ(cudaStreamEndCapture(stream_, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&executable, graph), cudaSuccess);
  EXPECT_EQ(cudaGraphLaunch(executable, stream_), cudaSuccess);
  EXPECT_EQ(host_after_all(), all(3));
  cudaGraphDestroy(graph);
  cudaGraphExecDestroy(executable);
}

TEST_F(ExecutorStreams, OnlyThreeWaysToBeDone) {
  EXPECT_EQ(cuda_on_cpu::set_streams("random:5"), "eager");
  EXPECT_THROW(cuda_on_cpu::set_streams("early"), std::invalid_argument);
  EXPECT_EQ(cuda_on_cpu::set_streams("late"), "random:5");
}
}  // namespace
#endif
