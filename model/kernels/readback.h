// A few float64 values on their way from where they are computed to the host, while nobody waits.
//
//   Readback loss(ctx, 1);
//   each step:   ... enqueue work that makes `value` ...
//                loss.fetch(value);                  // enqueues the copy behind that work
//                const int64_t ticket = loss.mark();
//   later:       loss.wait(ticket)[0]                // waits for that step alone
//
// fetch() may be recorded in a CUDA graph; mark() may not: it comes after the graph's launch. So that step k
// can be read after step k + 1 was enqueued, fetches go to the slots of a ring in turn; mark() closes one. A
// ticket stays good until `ring` later fetches. A fetch that nobody marked is replaced by the next one. On
// the CPU a fetch is a plain copy.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "model/kernels/context.h"
#include "model/kernels/stream.h"

class Readback {
 public:
  /// For `count` values at a time, of which the last `ring` >= 2 fetches are kept.
  Readback(Context& ctx, int64_t count, int ring = 2);
  Readback(const Readback&) = delete;
  Readback& operator=(const Readback&) = delete;

  /// Copies `values`, f64 (count) where ctx computes, once all work enqueued so far is done.
  void fetch(const Tensor& values);
  /// Closes the last fetch and returns its ticket: 0, 1, 2, ... Without a fetch since, the same ticket again.
  int64_t mark();
  /// Waits until the ticket's values are here. The span is good for as long as the ticket; std::logic_error
  /// when that is over.
  std::span<const double> wait(int64_t ticket);

 private:
  double* slot(int64_t ticket) const {
    return reinterpret_cast<double*>(host_.data()) + ticket % ring_ * count_;
  }

  Context& ctx_;
  int64_t count_, ring_;
  HostBuffer host_;                                  // (ring, count)
  std::vector<std::shared_ptr<gpu::Event>> events_;  // one per slot; none on the CPU
  int64_t next_ = 0;                                 // the ticket of the open fetch, or of the next one
  bool open_ = false;                                // fetched, not marked yet
};
