// For the executor: what stands behind cudaStream_t, cudaEvent_t and cudaGraph_t.
#pragma once

#include <vector>

#include "dev/cuda_on_cpu/capture.h"
#include "dev/cuda_on_cpu/queue.h"

namespace cuda_on_cpu {

/// From cudaStreamBeginCapture to cudaStreamEndCapture.
struct Capture {
  cudaStream_t origin;
  cudaStreamCaptureMode mode;
  bool valid = true, ended = false;
  int unjoined = 0;             // streams with work that the origin has not waited for
  std::vector<Work> work = {};  // of all streams, in the order of the calls
};
using CaptureOf = std::shared_ptr<Capture>;

bool capturing(cudaStream_t stream);
/// Whether a capture is there and under way.
bool goes_on(const CaptureOf& capture);
/// Nothing of the capture will come to anything.
cudaError_t spoil(Capture& capture, cudaError_t error, const char* call, const char* why);
/// Whether any capture is under way; of a blocking stream.
bool any_capture();
bool any_blocking_capture();

}  // namespace cuda_on_cpu

struct CUstream_st {
  cuda_on_cpu::Queue queue;
  cuda_on_cpu::CaptureOf capture = {};  // that this stream is, or was, part of
  int work = 0;                         // in that capture
  int joined = 0;                       // of these, how many somebody else waits for
};
struct CUevent_st {
  bool timed = true;
  std::shared_ptr<cuda_on_cpu::Record> record = {};  // the last outside of captures; null: none, or captured
  cuda_on_cpu::CaptureOf capture = {};               // that recorded it last; null outside of captures
  cudaStream_t stream = nullptr;
  int work = 0;  // of that stream before it
};
struct CUgraph_st {
  std::vector<cuda_on_cpu::Work> work;
};
struct CUgraphExec_st {
  std::vector<cuda_on_cpu::Work> work;
};
