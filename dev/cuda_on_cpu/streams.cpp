// Streams and events of the runtime.
#include "dev/cuda_on_cpu/streams.h"

#include "dev/cuda_on_cpu/device_memory.h"

using cuda_on_cpu::capturing;
using cuda_on_cpu::Record;
using cuda_on_cpu::refuse;
using cuda_on_cpu::report;
using cuda_on_cpu::spoil;

namespace {
cudaError_t done() {
  cuda_on_cpu::close_device_memory();
  return cudaSuccess;
}

/// For calls that wait for a stream.
cudaError_t look_at(const char* call, cudaStream_t stream) {
  if (capturing(stream))
    return spoil(*stream->capture, cudaErrorStreamCaptureUnsupported, call,
                 "the stream is being captured into a graph, its work has not begun");
  if (stream == nullptr && cuda_on_cpu::any_blocking_capture())
    return refuse(cudaErrorStreamCaptureImplicit,
                  "%s: on the legacy stream while a blocking stream is captured", call);
  return cudaSuccess;
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
  cuda_on_cpu::Capture& capture = *stream->capture;
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

// -------------------------------------------------------------------------------------------------- streams
cudaError_t cudaDeviceSynchronize() {
  if (cuda_on_cpu::any_capture())
    return refuse(cudaErrorStreamCaptureUnsupported,
                  "cudaDeviceSynchronize: a stream is being captured into a graph");
  cuda_on_cpu::finish(cuda_on_cpu::Which::all);
  return done();
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  *stream = new CUstream_st{.queue = cuda_on_cpu::Queue((flags & cudaStreamNonBlocking) == 0)};
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
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
  return done();
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (const cudaError_t error = look_at("cudaStreamSynchronize", stream)) return error;
  stream == nullptr ? finish(cuda_on_cpu::Which::blocking) : stream->queue.finish();
  return done();
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (const cudaError_t error = look_at("cudaStreamQuery", stream)) return error;
  if (stream == nullptr)
    finish(cuda_on_cpu::Which::blocking);
  else if (!stream->queue.advance())
    return cudaErrorNotReady;
  return done();
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (event == nullptr) return report(cudaErrorInvalidResourceHandle);
  if (!event->record && !event->capture) return cudaSuccess;  // never recorded
  if (capturing(stream)) return wait_in_capture(stream, *event);
  if (!event->capture) {
    if (stream != nullptr)
      stream->queue.add({.waits_for = event->record});
    else
      finish(*event->record);
    return cudaSuccess;
  }
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
  *event = new CUevent_st{.timed = (flags & cudaEventDisableTiming) == 0};
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
  event->stream = stream;
  event->work = stream != nullptr ? stream->work : 0;
  event->capture = capturing(stream) ? stream->capture : nullptr;
  event->record = event->capture ? nullptr : std::make_shared<Record>();
  if (event->capture) return cudaSuccess;
  if (stream != nullptr) {
    stream->queue.add({.marks = event->record});
  } else {
    finish(cuda_on_cpu::Which::blocking);
    *event->record = {.done = true, .time = std::chrono::steady_clock::now()};
  }
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (const cudaError_t error = look_at("cudaEventSynchronize", event)) return error;
  if (event->record) finish(*event->record);
  return done();
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (const cudaError_t error = cuda_on_cpu::check_unsafe("cudaEventQuery")) return error;
  if (const cudaError_t error = look_at("cudaEventQuery", event)) return error;
  if (event->record && !advance(*event->record)) return cudaErrorNotReady;
  return done();
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  for (const cudaEvent_t event : {start, end}) {
    if (const cudaError_t error = look_at("cudaEventElapsedTime", event)) return error;
    if (!event->record || !event->timed) return report(cudaErrorInvalidResourceHandle);
    if (!event->record->done) return report(cudaErrorNotReady);
  }
  *milliseconds = std::chrono::duration<float, std::milli>(end->record->time - start->record->time).count();
  return cudaSuccess;
}
