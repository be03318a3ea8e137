#include "dev/cuda_on_cpu/grid.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "dev/cuda_on_cpu/device_memory.h"
#include "dev/cuda_on_cpu/symbols.h"

namespace cuda_on_cpu {
namespace {
// ------------------------------------------------------------------------------------------------ the order
ThreadOrder parse_order(const std::string& order) {
  if (order == "forward") return {};
  if (order == "reverse") return {.kind = ThreadOrder::Kind::reverse};
  if (order.rfind("random:", 0) == 0)
    return {.kind = ThreadOrder::Kind::random, .seed = std::stoull(order.substr(7))};
  throw std::invalid_argument("cuda_on_cpu: order \"" + order + "\", need forward, reverse or random:SEED");
}

ThreadOrder& order() {
  static ThreadOrder order = [] {
    const char* wish = std::getenv("CUDA_ON_CPU_ORDER");
    return parse_order(wish != nullptr ? wish : "forward");
  }();
  return order;
}

// ----------------------------------------------------------------------------------------------- the blocks
/// One grid, shared by the OS threads that work on it.
struct Job {
  dim3 grid, block;
  size_t shared;
  Body body;
  const void* kernel;
  uint64_t blocks;
  uint64_t stride;  // random order: block i is number i * stride modulo blocks
  std::atomic<uint64_t> next{0};

  uint3 take(uint64_t i) const {
    if (order().kind == ThreadOrder::Kind::reverse) i = blocks - 1 - i;
    if (order().kind == ThreadOrder::Kind::random) i = i % blocks * stride % blocks;
    return {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
            static_cast<unsigned>(i / grid.x / grid.y)};
  }
};

uint64_t stride_of(uint64_t blocks) {
  uint64_t stride = (order().seed * 40503 + 12345) % std::min<uint64_t>(blocks, 1u << 30);
  while (std::gcd(stride, blocks) != 1) ++stride;
  return stride;
}

void work_on(Job& job) {
  thread_local std::unique_ptr<Block> block;
  if (!block) block = std::make_unique<Block>();
  block->grid = job.grid;
  block->size = job.block;
  block->threads = static_cast<int>(job.block.x * job.block.y * job.block.z);
  block->warps = (block->threads + kLanes - 1) / kLanes;
  block->shared_bytes = job.shared;
  block->body = job.body;
  block->kernel = job.kernel;
  block->order = order();
  for (uint64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.blocks;)
    block->run(job.take(i));
}

// ---------------------------------------------------------------------------------------------- the workers
/// OS threads that help with grids of several blocks. They last as long as the program: launches are many and
/// small, and nobody waits for a helper that has not woken up yet.
class Helpers {
 public:
  explicit Helpers(int count) {
    for (int i = 0; i < count; ++i) threads_.emplace_back([this] { serve(); });
  }
  ~Helpers() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  Helpers(const Helpers&) = delete;
  Helpers& operator=(const Helpers&) = delete;

  void work_with(Job& job) {
    // One grid at a time has the helpers; when two host threads launch at once, one goes alone.
    const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock() || threads_.empty()) return work_on(job);
    {
      const std::lock_guard lock(mutex_);
      job_ = &job;
      ++round_;
    }
    wake_.notify_all();
    work_on(job);
    std::unique_lock lock(mutex_);
    job_ = nullptr;
    idle_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void serve() {
    std::unique_lock lock(mutex_);
    for (uint64_t seen = 0;;) {
      wake_.wait(lock, [&] { return stop_ || (job_ != nullptr && round_ != seen); });
      if (stop_) return;
      Job* job = job_;
      seen = round_;
      ++busy_;
      lock.unlock();
      work_on(*job);
      lock.lock();
      if (--busy_ == 0) idle_.notify_all();
    }
  }

  std::vector<std::thread> threads_;
  std::mutex turn_, mutex_;
  std::condition_variable wake_, idle_;
  Job* job_ = nullptr;
  uint64_t round_ = 0;  // counts the jobs
  int busy_ = 0;
  bool stop_ = false;
};

std::atomic<bool> forked{false};  // the child of a fork has no helpers

int worker_count() {
  if (const char* wish = std::getenv("CUDA_ON_CPU_THREADS")) return std::max(1, std::atoi(wish));
  // One in race checks: a report that names two threads of one block is easier to read.
  return kTsan ? 1 : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

Helpers& helpers() {
  static Helpers helpers((pthread_atfork(nullptr, nullptr, [] { forked = true; }), worker_count() - 1));
  return helpers;
}
}  // namespace

void set_order(const std::string& wish) {
  order() = parse_order(wish);
}

namespace {
/// What a launch of any kernel must keep to.
void check_launch(dim3 grid, dim3 block, size_t shared, const void* kernel) {
  if (uint64_t{grid.x} * grid.y * grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    fail("a grid of (%u,%u,%u) blocks cannot be launched", grid.x, grid.y, grid.z);
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64)
    fail("a block of (%u,%u,%u) threads cannot be launched", block.x, block.y, block.z);
  size_t of_its_own = static_shared_bytes(kernel);
  if (of_its_own > kMaxUnaskedShared)
    fail("%zu bytes of static shared memory, a kernel has at most %zu", of_its_own, kMaxUnaskedShared);
  // Dynamic shared memory begins behind it, where DYN_SHARED is aligned to.
  if (shared > 0) of_its_own = (of_its_own + 1023) / 1024 * 1024;
  if (shared + of_its_own > kMaxDynamicShared)
    fail("%zu bytes of dynamic and %zu of static shared memory, a block has at most %zu", shared, of_its_own,
         kMaxDynamicShared);
  if (shared <= kMaxDynamicUnasked && shared + of_its_own > kMaxUnaskedShared)
    fail(
        "%zu bytes of dynamic and %zu of static shared memory: launch() asks for more than %zu together only "
        "above %zu of dynamic",
        shared, of_its_own, kMaxUnaskedShared, kMaxDynamicUnasked);
}
}  // namespace

void run_grid(dim3 grid, dim3 block, size_t shared, Body body, const void* kernel) {
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  check_launch(grid, block, shared, kernel);
  if (current_block != nullptr) fail("a kernel launches a kernel");
  const DeviceAccess access(DeviceAccess::From::kernel);
  Job job{grid, block, shared, body, kernel, blocks, stride_of(blocks)};
  if (blocks == 1 || forked)
    work_on(job);
  else
    helpers().work_with(job);
}

}  // namespace cuda_on_cpu
