// Streams as queues of work, and when that work is done:
//
//   eager        by the call that enqueues it
//   late         when the host waits for it, or for what comes behind it: no sooner, and nothing else
//   random:SEED  some of it during any later call that enqueues, from any stream; the rest as above
//
// A GPU may do anything in between. Streams that miss a wait for each other, and a host that reads, refills
// or frees page-locked memory before a copy is over, work eagerly and go wrong in one of the others.
//
// A record is one cudaEventRecord: a place in a queue. What waits for it begins when the queue has come so
// far. Work on the legacy stream is done at once, behind that of all blocking streams; so nothing ever waits
// for it. One lock guards all queues and is held while work is done, not while other processes are waited
// for: host threads take turns, but for eager work, which needs none.
#pragma once

#include <chrono>
#include <deque>
#include <functional>
#include <memory>
#include <string>

#include "dev/cuda_on_cpu/runtime.h"

namespace cuda_on_cpu {

/// "eager", "late" or "random:SEED", for all streams from now on; finishes what is enqueued, and returns what
/// held until now. The environment variable CUDA_ON_CPU_STREAMS sets the first one. Throws
/// std::invalid_argument.
std::string set_streams(const std::string& when);

using Work = std::function<void()>;
/// Every queue, or the blocking ones.
enum class Which { all, blocking };

/// Enqueues what `call` does on a stream, or adds it to the graph that the stream is captured into. Kernels
/// come this way, too: enqueue("launch", stream, [=] { run(...); }), with their arguments in the closure.
/// `pageable`: it touches host memory that is not page-locked.
cudaError_t enqueue(const char* call, cudaStream_t stream, Work work, bool pageable = false);

// ----------------------------------------------------------------------------------------- for the executor

/// Whether work is done by the call that enqueues it.
bool eager();

class Queue;

struct Record {
  Queue* queue = nullptr;  // that it is a place in, while it is not done
  bool done = false;
  std::chrono::steady_clock::time_point time = {};  // when it was
};

/// One thing after the other: waits for a record, waits for others, works, marks; each may be absent.
struct Task {
  Work work = {};
  std::shared_ptr<Record> waits_for = {}, marks = {};
  std::function<bool()> ready = {};  // whether other processes have come so far; asked again and again
};

class Queue {
 public:
  /// `blocking`: the legacy stream waits for it.
  explicit Queue(bool blocking);
  /// Finishes.
  ~Queue();
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  void add(Task task);
  /// Does all that is enqueued, and what it waits for.
  void finish();
  /// Does one task, here or in the queue that it waits for. True when none is left here: an answer for those
  /// who only ask, and would otherwise ask for ever.
  bool advance();
  bool blocking() const { return blocking_; }

 private:
  friend void finish(Record& record);
  friend bool advance(Record& record);
  friend void finish(Which which);
  static void stir();
  bool ready() const;
  bool step();

  const bool blocking_;
  std::deque<Task> tasks_;
};

/// Goes on until the record is done.
void finish(Record& record);
/// One step towards it; whether it is done.
bool advance(Record& record);
/// Goes on until these queues are empty.
void finish(Which which);

}  // namespace cuda_on_cpu
