#include "model/kernels/readback.h"

#include <cstring>

Readback::Readback(Context& ctx, int64_t count, int ring)
    : ctx_(ctx), count_(count), ring_(ring), host_(ctx, 8 * count * ring) {
  expect(ring >= 2, "Readback: the ring needs two slots");
  if constexpr (kHaveGpu)
    if (ctx.device)
      for (int i = 0; i < ring; ++i) events_.push_back(gpu::make_event(*ctx.device));
}

void Readback::fetch(const Tensor& values) {
  expect(values.dtype == DType::f64 && values.size() == count_, "Readback: need f64 values of its count");
  open_ = true;
  if constexpr (kHaveGpu)
    if (ctx_.device)
      return gpu::copy_out_async(*ctx_.device, gpu::Stream::compute, slot(next_), values.data,
                                 values.bytes());
  std::memcpy(slot(next_), values.data, static_cast<size_t>(values.bytes()));
}

int64_t Readback::mark() {
  if (!open_) return next_ - 1;
  open_ = false;
  if constexpr (kHaveGpu)
    if (ctx_.device)
      gpu::record(*ctx_.device, gpu::Stream::compute, *events_[static_cast<size_t>(next_ % ring_)]);
  return next_++;
}

std::span<const double> Readback::wait(int64_t ticket) {
  if (ticket < 0 || ticket >= next_) throw std::logic_error("Readback: no such ticket");
  if (ticket < next_ + (open_ ? 1 : 0) - ring_) throw std::logic_error("Readback: the ticket is too old");
  if constexpr (kHaveGpu)
    if (ctx_.device) gpu::wait_on_host(*events_[static_cast<size_t>(ticket % ring_)]);
  return {slot(ticket), static_cast<size_t>(count_)};
}
