#include "dev/cuda_on_cpu/queue.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

namespace cuda_on_cpu {
namespace {
struct When {
  enum class Kind { eager, late, random } kind = Kind::eager;
  std::minstd_rand random = {};
  std::string name = {};
};

When parse_when(const std::string& name) {
  if (name == "eager") return {.name = name};
  if (name == "late") return {.kind = When::Kind::late, .name = name};
  if (name.rfind("random:", 0) == 0)
    return {.kind = When::Kind::random,
            .random = std::minstd_rand(static_cast<unsigned>(std::stoul(name.substr(7)))),
            .name = name};
  throw std::invalid_argument("cuda_on_cpu: streams \"" + name + "\", need eager, late or random:SEED");
}

When first_when() {
  const char* wish = std::getenv("CUDA_ON_CPU_STREAMS");
  return parse_when(wish != nullptr ? wish : "eager");
}

/// All queues, in the order of their making, and when their work is done.
struct Queues {
  std::mutex mutex;
  std::vector<Queue*> all;
  When when = first_when();
};
Queues& queues() {
  static Queues* queues = new Queues;  // never destroyed: streams may outlive it
  return *queues;
}

void do_task(const Task& task) {
  if (task.work) task.work();
  if (!task.marks) return;
  task.marks->time = std::chrono::steady_clock::now();
  task.marks->done = true;
}

void wait_for_others() {
  std::this_thread::sleep_for(std::chrono::microseconds(50));
}

enum class State { done, got_on, waiting };
/// Calls go() -> State under the lock until it is done.
template <typename Go>
void persist(const Go& go) {
  for (;;) {
    State state;
    {
      const std::lock_guard lock(queues().mutex);
      state = go();
    }
    if (state == State::done) return;
    if (state == State::waiting) wait_for_others();
  }
}
}  // namespace

bool eager() {
  return queues().when.kind == When::Kind::eager;
}

std::string set_streams(const std::string& name) {
  When wish = parse_when(name);
  finish(Which::all);
  std::swap(wish, queues().when);
  return wish.name;
}

Queue::Queue(bool blocking) : blocking_(blocking) {
  const std::lock_guard lock(queues().mutex);
  queues().all.push_back(this);
}

Queue::~Queue() {
  finish();
  const std::lock_guard lock(queues().mutex);
  std::erase(queues().all, this);
}

/// Some of what could be done now, anywhere.
void Queue::stir() {
  Queues& q = queues();
  for (auto tries = q.when.random() % 3; tries > 0; --tries) {
    Queue& queue = *q.all[q.when.random() % q.all.size()];
    if (queue.ready()) queue.step();
  }
}

void Queue::add(Task task) {
  if (eager()) {
    while (task.ready && !task.ready()) wait_for_others();
    return do_task(task);
  }
  const std::lock_guard lock(queues().mutex);
  if (task.marks) task.marks->queue = this;
  tasks_.push_back(std::move(task));
  if (queues().when.kind == When::Kind::random) stir();
}

bool Queue::ready() const {
  if (tasks_.empty()) return false;
  const Task& task = tasks_.front();
  return (!task.waits_for || task.waits_for->done) && (!task.ready || task.ready());
}

/// Does the first task, or one of the queue that it waits for. False when it waits for other processes. A
/// record that is waited for was made by an earlier call, so it does not stand behind its own waiter.
bool Queue::step() {
  const Task& first = tasks_.front();
  if (first.waits_for && !first.waits_for->done) return first.waits_for->queue->step();
  if (first.ready && !first.ready()) return false;
  const Task task = std::move(tasks_.front());
  tasks_.pop_front();
  do_task(task);
  return true;
}

void Queue::finish() {
  persist([&] {
    if (tasks_.empty()) return State::done;
    return step() ? State::got_on : State::waiting;
  });
}

bool Queue::advance() {
  const std::lock_guard lock(queues().mutex);
  if (!tasks_.empty()) step();
  return tasks_.empty();
}

void finish(Record& record) {
  persist([&] {
    if (record.done) return State::done;
    return record.queue->step() ? State::got_on : State::waiting;
  });
}

bool advance(Record& record) {
  const std::lock_guard lock(queues().mutex);
  if (!record.done) record.queue->step();
  return record.done;
}

void finish(Which which) {
  persist([&] {
    State state = State::done;
    for (Queue* queue : queues().all) {
      if (queue->tasks_.empty() || (which == Which::blocking && !queue->blocking())) continue;
      if (queue->step())
        state = State::got_on;
      else if (state == State::done)
        state = State::waiting;
    }
    return state;
  });
}

}  // namespace cuda_on_cpu
