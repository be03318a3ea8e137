// The order of work on a GPU, for the few places that arrange it: batches on their way in while the previous
// one is in use, and a training step that is enqueued as one CUDA graph. On the CPU everything happens at
// once and in order, and these do next to nothing.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "model/kernels/context.h"

namespace gpu {
enum class Stream : uint8_t { compute, copy };

/// A point in a stream's work.
struct Event;
std::shared_ptr<Event> make_event(Device& device);
/// The event happens when all work enqueued on the stream so far is done.
void record(Device& device, Stream stream, Event& event);
/// Work enqueued on the stream from now on waits for the event; one never recorded has happened.
void wait(Device& device, Stream stream, Event& event);
void wait_on_host(Event& event);
/// Enqueues copies from and to page-locked host memory.
void copy_in_async(Device& device, Stream stream, void* to, const void* from_pinned, int64_t bytes);
void copy_out_async(Device& device, Stream stream, void* to_pinned, const void* from, int64_t bytes);

/// What a stream was told to do, ready to be done again.
struct Graph;
/// From now on the compute stream writes down its work instead of doing it.
void begin_capture(Device& device);
/// Ends that and does what was written down, in one launch. `graph` is the one of the previous time (null at
/// first), updated when it has the same shape and replaced when not.
void launch_captured(Device& device, std::shared_ptr<Graph>& graph);
/// Ends the writing down after a failure and forgets it.
void drop_captured(Device& device);
}  // namespace gpu

/// Page-locked host memory; ordinary memory on the CPU.
class HostBuffer {
 public:
  HostBuffer(const Context& ctx, int64_t bytes);
  ~HostBuffer();
  HostBuffer(const HostBuffer&) = delete;
  char* data() const { return data_; }

 private:
  std::shared_ptr<gpu::Device> device_;
  char* data_;
};

/// Integers from the host to where ctx computes, without anybody waiting: staged in page-locked memory and
/// copied on a stream of their own while earlier work goes on. Two slots take turns. On the CPU the staging
/// memory is what is used.
class Upload {
 public:
  /// For up to `count` integers at a time.
  Upload(Context& ctx, int64_t count);
  Upload(const Upload&) = delete;

  /// Where the next integers are to be written. Waits only while the second last send() is still being
  /// copied.
  int32_t* staging();
  /// A tensor (count) of what is in staging(). Work enqueued from now on sees it; it is overwritten by the
  /// second next send(), after all work enqueued before the next one.
  Tensor send(int64_t count);

 private:
  struct Slot {
    std::unique_ptr<HostBuffer> host;
    Memory device;                           // empty on the CPU
    std::shared_ptr<gpu::Event> sent, used;  // the copy is done; nothing uses the slot any more
  };
  Context& ctx_;
  Slot slots_[2];
  int next_ = 0;
};

/// Runs a body of operations as one CUDA graph: captured anew each time, which takes a fraction of a
/// millisecond while the GPU is still busy with the previous one, and updated in place when only arguments
/// changed. So step sizes and pointers are plain arguments, and nothing needs to know what may change. The
/// first call runs the body directly: whatever is measured at first use is measured there. On the CPU, with a
/// profile, or when not `enabled` the body just runs.
class StepGraph {
 public:
  explicit StepGraph(Context& ctx, bool enabled = true) : ctx_(ctx), enabled_(enabled) {}
  /// The body may only enqueue work on ctx: no waiting, no values on the host.
  void run(const std::function<void()>& body);

 private:
  Context& ctx_;
  bool enabled_;
  bool first_ = true;
  std::shared_ptr<gpu::Graph> graph_;
};
