#include "model/kernels/stream.h"

#include "model/kernels/cuda.h"
#include "model/kernels/host_wait.h"

struct gpu::Event {
  Device& device;
  cudaEvent_t event = nullptr;
  explicit Event(Device& device) : device(device) {
    CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  }
  ~Event() { cudaEventDestroy(event); }
  Event(const Event&) = delete;
};

struct gpu::Graph {
  cudaGraphExec_t executable = nullptr;
  ~Graph() {
    if (executable != nullptr) cudaGraphExecDestroy(executable);
  }
};

namespace {
cudaStream_t stream_of(gpu::Device& device, gpu::Stream stream) {
  return stream == gpu::Stream::compute ? device.stream : device.copy_stream;
}

/// Destroys the description of a graph when the executable one exists.
struct Description {
  cudaGraph_t graph = nullptr;
  ~Description() {
    if (graph != nullptr) cudaGraphDestroy(graph);
  }
};
}  // namespace

std::shared_ptr<gpu::Event> gpu::make_event(Device& device) {
  return std::make_shared<Event>(device);
}

void gpu::record(Device& device, Stream stream, Event& event) {
  CUDA_CHECK(cudaEventRecord(event.event, stream_of(device, stream)));
}

void gpu::wait(Device& device, Stream stream, Event& event) {
  CUDA_CHECK(cudaStreamWaitEvent(stream_of(device, stream), event.event, 0));
}

void gpu::wait_on_host(Event& event) {
  if (event.device.while_waiting)
    wait_until([&] { return cudaEventQuery(event.event); }, event.device.while_waiting);
  else
    CUDA_CHECK(cudaEventSynchronize(event.event));
}

void gpu::copy_in_async(Device& device, Stream stream, void* to, const void* from_pinned, int64_t bytes) {
  CUDA_CHECK(cudaMemcpyAsync(to, from_pinned, static_cast<size_t>(bytes), cudaMemcpyHostToDevice,
                             stream_of(device, stream)));
}

void gpu::copy_out_async(Device& device, Stream stream, void* to_pinned, const void* from, int64_t bytes) {
  CUDA_CHECK(cudaMemcpyAsync(to_pinned, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost,
                             stream_of(device, stream)));
}

void gpu::begin_capture(Device& device) {
  // Relaxed: another thread (the one that reads batches) may call what would not be legal in this one.
  CUDA_CHECK(cudaStreamBeginCapture(device.stream, cudaStreamCaptureModeRelaxed));
}

void gpu::launch_captured(Device& device, std::shared_ptr<Graph>& graph) {
  Description description;
  CUDA_CHECK(cudaStreamEndCapture(device.stream, &description.graph));
  if (!graph) graph = std::make_shared<Graph>();
  cudaGraphExecUpdateResultInfo result{};
  const bool updated = graph->executable != nullptr &&
                       cudaGraphExecUpdate(graph->executable, description.graph, &result) == cudaSuccess;
  if (!updated) {
    cudaGetLastError();  // that it cannot be updated is an answer, not a failure
    CUDA_CHECK(cudaStreamSynchronize(device.stream));  // the old one may still be at work; this is rare
    graph = std::make_shared<Graph>();
    CUDA_CHECK(cudaGraphInstantiate(&graph->executable, description.graph, 0));
  }
  CUDA_CHECK(cudaGraphLaunch(graph->executable, device.stream));
}

void gpu::drop_captured(Device& device) {
  Description description;
  cudaStreamEndCapture(device.stream, &description.graph);
  cudaGetLastError();
}
