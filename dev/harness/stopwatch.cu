#include "dev/harness/stopwatch.h"

#include <algorithm>

#include "model/kernels/cuda.h"

int64_t gpu::eviction_bytes([[maybe_unused]] Device& device) {
#ifdef CUDA_ON_CPU
  return 1 << 16;  // the executor has no caches of a GPU, and its times mean nothing
#else
  cudaDeviceProp properties;
  CUDA_CHECK(cudaGetDeviceProperties(&properties, device.index));
  return std::max<int64_t>(2 * int64_t{properties.l2CacheSize}, 1 << 20);
#endif
}

void gpu::copy_on_device(Device& device, void* to, const void* from, int64_t bytes) {
  CUDA_CHECK(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, device.stream));
}

namespace {
struct Event {
  cudaEvent_t event = nullptr;
  Event() { CUDA_CHECK(cudaEventCreate(&event)); }
  ~Event() { cudaEventDestroy(event); }
  Event(const Event&) = delete;
};
}  // namespace

// While the GPU evicts, the host enqueues the work: the events see no gap before the first kernel.
double gpu::event_seconds(Device& device, const Memory& evicted, const std::function<void()>& body) {
  const Event start, stop;
  for (int round = 0; round < 4; ++round)
    CUDA_CHECK(cudaMemsetAsync(evicted.data(), round, static_cast<size_t>(evicted.bytes()), device.stream));
  CUDA_CHECK(cudaEventRecord(start.event, device.stream));
  body();
  CUDA_CHECK(cudaEventRecord(stop.event, device.stream));
  CUDA_CHECK(cudaEventSynchronize(stop.event));
  float milliseconds = 0;
  CUDA_CHECK(cudaEventElapsedTime(&milliseconds, start.event, stop.event));
  return milliseconds * 1e-3;
}
