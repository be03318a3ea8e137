// Streams, events and graphs of the runtime: work is done when the call that enqueues it returns, so all that
// is left to keep is the time, and who is captured (capture.h).
#include <atomic>
#include <chrono>
#include <memory>

#include "dev/cuda_on_cpu/block.h"
#include "dev/cuda_on_cpu/capture.h"
#include "dev/cuda_on_cpu/device_memory.h"

using cuda_on_cpu::refuse;
using cuda_on_cpu::report;

namespace {
/// From cudaStreamBeginCapture to cudaStreamEndCapture.
struct Capture {
  cudaStream_t origin;
  cudaStreamCaptureMode mode;
  bool valid = true, ended = false;
  int unjoined = 0;  // streams with work that the origin has not waited for
};
using CaptureOf = std::shared_ptr<Capture>;

bool goes_on(const CaptureOf& capture) {
  return capture && !capture->ended;
}
}  // namespace

struct CUstream_st {
  bool blocking = true;  // waits for the legacy stream, and it for this one
  CaptureOf capture;     // that this stream is, or was, part of
  int work = 0;          // copies and memsets in that capture
  int joined = 0;        // of these, how many somebody else waits for
};
struct CUevent_st {
  bool timed = true, recorded = false;
  std::chrono::steady_clock::time_point time;
  CaptureOf capture;  // that recorded it last; null outside of captures
  cudaStream_t stream = nullptr;
  int work = 0;  // of that stream before it
};
struct CUgraph_st {};
struct CUgraphExec_st {
  bool done_by_capture = true;
};

namespace {
// Captures under way: all, those that no thread may disturb, those of blocking streams, and those of this
// thread that it may not disturb itself.
std::atomic<int> captures{0}, global_captures{0}, blocking_captures{0};
thread_local int own_captures = 0;

void count(const Capture& capture, int by) {
  captures += by;
  if (capture.mode == cudaStreamCaptureModeGlobal) global_captures += by;
  if (capture.mode != cudaStreamCaptureModeRelaxed) own_captures += by;
  if (capture.origin->blocking) blocking_captures += by;
}

bool capturing(cudaStream_t stream) {
  return stream != nullptr && goes_on(stream->capture);
}

cudaError_t spoil(Capture& capture, cudaError_t error, const char* call, const char* why) {
  capture.valid = false;
  return refuse(error, "%s: %s", call, why);
}

cudaError_t synchronize() {
  cuda_on_cpu::close_device_memory();
  return cudaSuccess;
}

cudaError_t wait_for(const char* call, cudaStream_t stream) {
  if (capturing(stream))
    return spoil(*stream->capture, cudaErrorStreamCaptureUnsupported, call,
                 "the stream is being captured into a graph, its work has not begun");
  if (stream == nullptr && blocking_captures > 0)
    return refuse(cudaErrorStreamCaptureImplicit,
                  "%s: on the legacy stream while a blocking stream is captured", call);
  return synchronize();
}

/// For calls that look at an event from the host.
cudaError_t look_at(const char* call, cudaEvent_t event) {
  if (event == nullptr) return report(cudaErrorInvalidResourceHandle);
  if (!event->capture) return cudaSuccess;
  const char* why = "the event was last recorded in a capture: it stands for a place in a graph";
  if (goes_on(event->capture)) return spoil(*event->capture, cudaErrorCapturedEvent, call, why);
  return refuse(cudaErrorCapturedEvent, "%s: %s", call, why);
}

cudaError_t wait_in_capture(cudaStream_t stream, const CUevent_st& event) {
  Capture& capture = *stream->capture;
  if (event.capture != stream->capture)
    return spoil(capture, cudaErrorStreamCaptureIsolation, "cudaStreamWaitEvent",
                 "a capturing stream waits for an event that was recorded outside of its capture");
  CUstream_st& other = *event.stream;
  if (&other == stream || event.work <= other.joined) return cudaSuccess;
  if (other.joined < other.work && event.work == other.work) --capture.unjoined;
  other.joined = event.work;
  return cudaSuccess;
}
}  // namespace

cudaError_t cuda_on_cpu::check_unsafe(const char* call) {
  if (own_captures == 0 && global_captures == 0) return cudaSuccess;
  return refuse(cudaErrorStreamCaptureUnsupported,
                "%s: not while a stream is captured in a mode that forbids it", call);
}

cudaError_t cuda_on_cpu::check_work(const char* call, cudaStream_t stream, bool pageable) {
  if (stream == nullptr && blocking_captures > 0)
    return refuse(cudaErrorStreamCaptureImplicit,
                  "%s: on the legacy stream while a blocking stream is captured", call);
  if (!capturing(stream)) return cudaSuccess;
  Capture& capture = *stream->capture;
  if (!capture.valid) return report(cudaErrorStreamCaptureInvalidated);
  if (pageable)
    return spoil(capture, cudaErrorStreamCaptureUnsupported, call,
                 "in a capture, and the host memory is not page-locked: the graph would use it when it runs");
  if (stream != capture.origin && stream->joined == stream->work) ++capture.unjoined;
  ++stream->work;
  return cudaSuccess;
}

// -------------------------------------------------------------------------------------------------- streams
cudaError_t cudaDeviceSynchronize() {
  if (captures > 0)
    return refuse(cudaErrorStreamCaptureUnsupported,
                  "cudaDeviceSynchronize: a stream is being captured into a graph");
  return synchronize();
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  *stream = new CUstream_st{.blocking = (flags & cudaStreamNonBlocking) == 0, .capture = {}};
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  return cudaStreamCreateWithFlags(stream, flags);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (stream == nullptr) return report(cudaErrorInvalidResourceHandle);
  if (capturing(stream))
    return spoil(*stream->capture, cudaErrorStreamCaptureUnsupported, "cudaStreamDestroy",
                 "the stream is being captured into a graph");
  delete stream;
  return synchronize();
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return wait_for("cudaStreamSynchronize", stream);
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return wait_for("cudaStreamQuery", stream);
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (event == nullptr) return report(cudaErrorInvalidResourceHandle);
  if (!event->recorded) return cudaSuccess;
  if (capturing(stream)) return wait_in_capture(stream, *event);
  if (!event->capture) return cudaSuccess;
  if (!goes_on(event->capture))
    return refuse(cudaErrorCapturedEvent,
                  "cudaStreamWaitEvent: the event was last recorded in a capture that has ended");
  if (stream == nullptr) return report(cudaErrorStreamCaptureImplicit);
  stream->capture = event->capture;  // a fork
  stream->work = stream->joined = 0;
  return cudaSuccess;
}

// --------------------------------------------------------------------------------------------------- events
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  *event = new CUevent_st{.timed = (flags & cudaEventDisableTiming) == 0, .time = {}, .capture = {}};
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return cudaEventCreateWithFlags(event, cudaEventDefault);
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  if (event == nullptr) return report(cudaErrorInvalidResourceHandle);
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (event == nullptr) return report(cudaErrorInvalidResourceHandle);
  event->recorded = true;
  event->time = std::chrono::steady_clock::now();
  event->capture = capturing(stream) ? stream->capture : nullptr;
  event->stream = stream;
  event->work = stream != nullptr ? stream->work : 0;
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (const cudaError_t error = look_at("cudaEventSynchronize", event)) return error;
  return synchronize();
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (const cudaError_t error = cuda_on_cpu::check_unsafe("cudaEventQuery")) return error;
  if (const cudaError_t error = look_at("cudaEventQuery", event)) return error;
  return synchronize();
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  for (const cudaEvent_t event : {start, end}) {
    if (const cudaError_t error = look_at("cudaEventElapsedTime", event)) return error;
    if (!event->recorded || !event->timed) return report(cudaErrorInvalidResourceHandle);
  }
  *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
  return cudaSuccess;
}

// --------------------------------------------------------------------------------------------------- graphs
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
  *graph = new CUgraph_st;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  if (graph == nullptr) return report(cudaErrorInvalidValue);
  *executable = new CUgraphExec_st;
  return cudaSuccess;
}
cudaError_t cudaGraphExecUpdate(cudaGraphExec_t executable, cudaGraph_t graph,
                                cudaGraphExecUpdateResultInfo* result) {
  if (executable == nullptr || graph == nullptr) return report(cudaErrorInvalidValue);
  executable->done_by_capture = true;
  result->result = cudaGraphExecUpdateSuccess;
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  if (executable == nullptr) return report(cudaErrorInvalidValue);
  if (const cudaError_t error = cuda_on_cpu::check_work("cudaGraphLaunch", stream)) return error;
  if (!executable->done_by_capture) return report(cudaErrorNotSupported);
  executable->done_by_capture = false;
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
