#include "dev/cuda_on_cpu/queue.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <random>
#include <stdexcept>
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
  std::recursive_mutex mutex;  // work may not enqueue, but what it waits for is done inside of it
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
  const std::lock_guard lock(queues().mutex);
  finish();
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
  if (eager()) return do_task(task);
  const std::lock_guard lock(queues().mutex);
  if (task.marks) task.marks->queue = this;
  tasks_.push_back(std::move(task));
  if (queues().when.kind == When::Kind::random) stir();
}

bool Queue::ready() const {
  return !tasks_.empty() && (!tasks_.front().waits_for || tasks_.front().waits_for->done);
}

/// A record that is waited for was made by an earlier call, so it does not stand behind its own waiter.
void Queue::step() {
  if (tasks_.front().waits_for) cuda_on_cpu::finish(*tasks_.front().waits_for);
  const Task task = std::move(tasks_.front());
  tasks_.pop_front();
  do_task(task);
}

void Queue::finish() {
  const std::lock_guard lock(queues().mutex);
  while (!tasks_.empty()) step();
}

bool Queue::advance() {
  const std::lock_guard lock(queues().mutex);
  if (!tasks_.empty()) step();
  return tasks_.empty();
}

void finish(Record& record) {
  const std::lock_guard lock(queues().mutex);
  while (!record.done) record.queue->step();
}

bool advance(Record& record) {
  const std::lock_guard lock(queues().mutex);
  if (!record.done) record.queue->advance();
  return record.done;
}

void finish(Which which) {
  const std::lock_guard lock(queues().mutex);
  for (Queue* queue : std::vector(queues().all))
    if (which == Which::all || queue->blocking()) queue->finish();
}

}  // namespace cuda_on_cpu
