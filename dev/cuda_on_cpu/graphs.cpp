// Graphs of the runtime: work that was captured, to be enqueued on one stream in the order of its calls; and
// what captures forbid.
#include <atomic>

#include "dev/cuda_on_cpu/device_memory.h"
#include "dev/cuda_on_cpu/streams.h"

namespace cuda_on_cpu {
namespace {
// Captures under way: all, those that no thread may disturb, those of blocking streams, and those of this
// thread that it may not disturb itself.
std::atomic<int> captures{0}, global_captures{0}, blocking_captures{0};
thread_local int own_captures = 0;

void count(const Capture& capture, int by) {
  captures += by;
  if (capture.mode == cudaStreamCaptureModeGlobal) global_captures += by;
  if (capture.mode != cudaStreamCaptureModeRelaxed) own_captures += by;
  if (capture.origin->queue.blocking()) blocking_captures += by;
}

/// Adds to the graph that a stream is captured into.
cudaError_t capture_work(const char* call, CUstream_st& stream, Work work, bool pageable) {
  Capture& capture = *stream.capture;
  if (!capture.valid) return report(cudaErrorStreamCaptureInvalidated);
  if (pageable)
    return spoil(capture, cudaErrorStreamCaptureUnsupported, call,
                 "in a capture, and the host memory is not page-locked: the graph would use it when it runs");
  if (&stream != capture.origin && stream.joined == stream.work) ++capture.unjoined;
  ++stream.work;
  capture.work.push_back(std::move(work));
  return cudaSuccess;
}
}  // namespace

bool any_capture() {
  return captures > 0;
}
bool any_blocking_capture() {
  return blocking_captures > 0;
}
bool goes_on(const CaptureOf& capture) {
  return capture && !capture->ended;
}
bool capturing(cudaStream_t stream) {
  return stream != nullptr && goes_on(stream->capture);
}

cudaError_t spoil(Capture& capture, cudaError_t error, const char* call, const char* why) {
  capture.valid = false;
  return refuse(error, "%s: %s", call, why);
}

cudaError_t check_unsafe(const char* call) {
  if (own_captures == 0 && global_captures == 0) return cudaSuccess;
  return refuse(cudaErrorStreamCaptureUnsupported,
                "%s: not while a stream is captured in a mode that forbids it", call);
}

cudaError_t enqueue(const char* call, cudaStream_t stream, Work work, bool pageable) {
  if (stream == nullptr) {
    if (blocking_captures > 0)
      return refuse(cudaErrorStreamCaptureImplicit,
                    "%s: on the legacy stream while a blocking stream is captured", call);
    finish(Which::blocking);
    work();
    return cudaSuccess;
  }
  if (capturing(stream)) return capture_work(call, *stream, std::move(work), pageable);
  stream->queue.add({.work = std::move(work)});
  return cudaSuccess;
}

}  // namespace cuda_on_cpu

using cuda_on_cpu::Capture;
using cuda_on_cpu::capturing;
using cuda_on_cpu::count;
using cuda_on_cpu::refuse;
using cuda_on_cpu::report;

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  if (stream == nullptr || capturing(stream)) return report(cudaErrorInvalidValue);
  stream->capture = std::make_shared<Capture>(Capture{.origin = stream, .mode = mode});
  stream->work = stream->joined = 0;
  count(*stream->capture, 1);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = !capturing(stream)       ? cudaStreamCaptureStatusNone
            : stream->capture->valid ? cudaStreamCaptureStatusActive
                                     : cudaStreamCaptureStatusInvalidated;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = nullptr;
  if (stream == nullptr || !capturing(stream)) return report(cudaErrorInvalidValue);
  Capture& capture = *stream->capture;
  if (capture.origin != stream)
    return spoil(capture, cudaErrorStreamCaptureUnmatched, "cudaStreamEndCapture",
                 "the capture began on another stream");
  capture.ended = true;
  count(capture, -1);
  if (!capture.valid) return report(cudaErrorStreamCaptureInvalidated);
  if (capture.unjoined > 0)
    return refuse(cudaErrorStreamCaptureUnjoined,
                  "cudaStreamEndCapture: %d other streams have captured work that this one does not wait for",
                  capture.unjoined);
  *graph = new CUgraph_st{std::move(capture.work)};
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  if (graph == nullptr) return report(cudaErrorInvalidValue);
  *executable = new CUgraphExec_st{graph->work};
  return cudaSuccess;
}
cudaError_t cudaGraphExecUpdate(cudaGraphExec_t executable, cudaGraph_t graph,
                                cudaGraphExecUpdateResultInfo* result) {
  if (executable == nullptr || graph == nullptr) return report(cudaErrorInvalidValue);
  const bool fits = executable->work.size() == graph->work.size();
  result->result = fits ? cudaGraphExecUpdateSuccess : cudaGraphExecUpdateErrorTopologyChanged;
  if (!fits) return report(cudaErrorGraphExecUpdateFailure);
  executable->work = graph->work;
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  if (executable == nullptr) return report(cudaErrorInvalidValue);
  for (const cuda_on_cpu::Work& work : executable->work)
    if (const cudaError_t error = cuda_on_cpu::enqueue("cudaGraphLaunch", stream, work)) return error;
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  if (graph == nullptr) return report(cudaErrorInvalidValue);
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  if (executable == nullptr) return report(cudaErrorInvalidValue);
  delete executable;
  return cudaSuccess;
}
