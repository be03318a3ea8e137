#include "model/kernels/stream.h"

HostBuffer::HostBuffer(const Context& ctx, int64_t bytes) : device_(ctx.device) {
  if constexpr (kHaveGpu)
    if (device_) {
      data_ = gpu::allocate_pinned(*device_, bytes);
      return;
    }
  data_ = new char[static_cast<size_t>(bytes)]();
}

HostBuffer::~HostBuffer() {
  if constexpr (kHaveGpu)
    if (device_) {
      gpu::release_pinned(*device_, data_);
      return;
    }
  delete[] data_;
}

Upload::Upload(Context& ctx, int64_t count) : ctx_(ctx) {
  for (Slot& slot : slots_) {
    slot.host = std::make_unique<HostBuffer>(ctx, 4 * count);
    if constexpr (kHaveGpu)
      if (ctx.device) {
        slot.device = Memory(ctx, 4 * count, "token batches");
        slot.sent = gpu::make_event(*ctx.device);
        slot.used = gpu::make_event(*ctx.device);
        // The memory is filled with zeros on the compute stream: the first copy comes after that.
        gpu::record(*ctx.device, gpu::Stream::compute, *slot.used);
      }
  }
}

int32_t* Upload::staging() {
  if constexpr (kHaveGpu)
    if (ctx_.device) gpu::wait_on_host(*slots_[next_].sent);
  return reinterpret_cast<int32_t*>(slots_[next_].host->data());
}

Tensor Upload::send(int64_t count) {
  Slot& slot = slots_[next_];
  next_ = 1 - next_;
  if constexpr (kHaveGpu)
    if (ctx_.device) {
      gpu::Device& device = *ctx_.device;
      gpu::record(device, gpu::Stream::compute,
                  *slots_[next_].used);  // all that uses the other slot is enqueued
      gpu::wait(device, gpu::Stream::copy, *slot.used);
      gpu::copy_in_async(device, gpu::Stream::copy, slot.device.data(), slot.host->data(), 4 * count);
      gpu::record(device, gpu::Stream::copy, *slot.sent);
      gpu::wait(device, gpu::Stream::compute, *slot.sent);
      return {reinterpret_cast<int32_t*>(slot.device.data()), {count}};
    }
  return {reinterpret_cast<int32_t*>(slot.host->data()), {count}};
}

void StepGraph::run(const std::function<void()>& body) {
  const bool direct = !enabled_ || first_ || !ctx_.device || ctx_.profile != nullptr;
  first_ = false;
  if (direct) return body();
  if constexpr (kHaveGpu) {
    gpu::begin_capture(*ctx_.device);
    try {
      body();
    } catch (...) {
      gpu::drop_captured(*ctx_.device);
      throw;
    }
    gpu::launch_captured(*ctx_.device, graph_);
  }
}
