// Times one call at a time with cold caches: before each call something else is written over the caches, as
// in a training step, where hundreds of megabytes pass between two uses of a tensor. The eviction is not
// timed.
#pragma once

#include <functional>

#include "model/kernels/context.h"

class Stopwatch {
 public:
  explicit Stopwatch(Context& ctx);
  /// Seconds of one call of `body`: by events on a GPU, by the clock on the CPU.
  double seconds(const std::function<void()>& body);

 private:
  Context& ctx_;
  Memory evicted_;
};

/// Copies between tensors of one size where ctx computes; on a GPU nobody waits.
void copy_tensor(Context& ctx, const Tensor& to, const Tensor& from);

// The GPU's side of it: stopwatch.cu.
namespace gpu {
/// Bytes that, written, leave nothing of what the L2 held.
int64_t eviction_bytes(Device& device);
double event_seconds(Device& device, const Memory& evicted, const std::function<void()>& body);
void copy_on_device(Device& device, void* to, const void* from, int64_t bytes);
}  // namespace gpu
