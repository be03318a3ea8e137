#include "dev/cuda_on_cpu/block.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "dev/cuda_on_cpu/collectives.h"
#include "dev/cuda_on_cpu/crash.h"
#include "dev/cuda_on_cpu/symbols.h"

#if CUDA_ON_CPU_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace cuda_on_cpu {

thread_local constinit Block* current_block = nullptr;
thread_local constinit Thread* current_thread = nullptr;

namespace {
constexpr size_t kRedzone = 256;  // bytes behind dynamic shared memory
constexpr size_t kArenaBytes = kMaxDynamicShared + 1024;
constexpr int kRedzoneByte = 0xc5;

}  // namespace

void print_place() {
  if (current_block == nullptr) return;
  const Block& b = *current_block;
  const std::string kernel = b.kernel == nullptr ? "" : " kernel " + function_name(b.kernel) + ",";
  std::fprintf(stderr, "cuda_on_cpu:   in%s block (%u,%u,%u)", kernel.c_str(), b.index.x, b.index.y,
               b.index.z);
  if (current_thread != nullptr) {
    const uint3 t = current_thread->index;
    std::fprintf(stderr, ", thread (%u,%u,%u)", t.x, t.y, t.z);
  }
  std::fputc('\n', stderr);
}
void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fputs("cuda_on_cpu: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
  print_place();
  std::fflush(stderr);
  std::abort();
}

// -------------------------------------------------------------------------------------------- who runs next
namespace {
uint64_t next_random(Block& b) {
  b.random = b.random * 6364136223846793005u + 1442695040888963407u;
  return b.random >> 33;
}

/// A lane of the mask: the first at or after `from` (forward), at or before it (reverse), around the warp.
int pick_lane(unsigned mask, int from, bool reverse) {
  const auto rotate = static_cast<unsigned>(from);
  if (!reverse) return (from + __builtin_ctz(mask >> rotate | mask << (-rotate & 31))) & 31;
  const unsigned up = 31 - rotate;
  return (from - __builtin_clz(mask << up | mask >> (-up & 31))) & 31;
}

/// The next thread to run, seen from `self` (null: from the outside); null when none is ready.
Thread* pick(Block& b, const Thread* self) {
  const bool reverse = b.order.kind == ThreadOrder::Kind::reverse;
  int first = self != nullptr ? self->warp : reverse ? b.warps - 1 : 0;
  int lane = self != nullptr ? self->lane : reverse ? kLanes - 1 : 0;
  if (b.order.kind == ThreadOrder::Kind::random) {
    const uint64_t r = next_random(b);
    first = static_cast<int>(r % static_cast<uint64_t>(b.warps));
    lane = static_cast<int>(r >> 20) % kLanes;
  }
  for (int i = 0; i < b.warps; ++i) {
    const int w = reverse ? (first - i + b.warps) % b.warps : (first + i) % b.warps;
    if (b.warp[w].ready != 0) return &b.thread[w * kLanes + pick_lane(b.warp[w].ready, lane, reverse)];
  }
  return nullptr;
}

/// Wakes the threads whose condition holds by now (waits on mbarriers).
bool wake_polling(Block& b) {
  bool any = false;
  for (int i = 0; i < b.threads && b.polling > 0; ++i) {
    Thread& t = b.thread[i];
    if (t.state != Thread::State::polling || !(*t.until)()) continue;
    --b.polling;
    make_ready(t);
    any = true;
  }
  return any;
}

std::string describe(const Thread& t) {
  char text[256];
  const char* file = std::strrchr(t.operation.where.file_name(), '/');
  std::snprintf(text, sizeof text, "%s (%s:%u)", t.operation.name,
                file != nullptr ? file + 1 : t.operation.where.file_name(), t.operation.where.line());
  std::string words = text;
  if (t.state == Thread::State::in_warp) {
    std::snprintf(text, sizeof text, ", mask %08x", t.mask);
    words += text;
  }
  if (t.state == Thread::State::at_barrier && t.barrier > 0) {
    const Barrier& barrier = current_block->barrier[t.barrier];
    words += ", barrier " + std::to_string(t.barrier) + " has " + std::to_string(barrier.arrived) + " of " +
             std::to_string(barrier.expected) + " threads";
  }
  if (t.state == Thread::State::polling && t.explain) words += ", " + t.explain();
  return words;
}

[[noreturn]] void report_deadlock(Block& b) {
  std::fputs("cuda_on_cpu: deadlock: no thread of the block can go on\n", stderr);
  int first = 0, lines = 0, finished = 0;
  std::string words;
  for (int i = 0; i <= b.threads && lines < 16; ++i) {
    const bool waits = i < b.threads && b.thread[i].state != Thread::State::finished;
    if (i < b.threads && !waits) ++finished;
    const std::string now = waits ? describe(b.thread[i]) : "";
    if (now == words) continue;
    if (!words.empty()) {
      std::fprintf(stderr, "cuda_on_cpu:   threads %d to %d wait in %s\n", first, i - 1, words.c_str());
      ++lines;
    }
    words = now;
    first = i;
  }
  current_thread = nullptr;
  fail("deadlock: a barrier or warp operation that not all of its threads reach (%d have returned)",
       finished);
}

/// The next thread to run; null when all have finished.
Thread* next_thread(Block& b, const Thread* self) {
  for (;;) {
    if (Thread* next = pick(b, self)) return next;
    if (b.alive == 0) return nullptr;
    if (wake_polling(b)) continue;
    if (b.engine.empty()) report_deadlock(b);
    // Copies made by the hardware come as late as they can: when nobody can go on without.
    const std::function<void()> copy = std::move(b.engine.front());
    b.engine.pop_front();
    copy();
  }
}

void thread_entry();

/// Gives a thread that is about to begin a stack.
void begin(Block& b, Thread& t) {
  t.started = true;
  // ThreadSanitizer knows a thread by its fiber, so there each thread keeps one for good.
  void* stack = kTsan && t.fiber.stack != nullptr ? t.fiber.stack : b.stacks.take();
  t.fiber.prepare(stack, thread_entry);
}

/// The body of `t` has returned.
void finish(Block& b, Thread& t) {
  t.state = Thread::State::finished;
  t.copies.clear();
  if (!t.products.empty()) fail("the thread returns with a wgmma that it did not wait for");
  t.products.clear();
  --b.alive;
  Warp& warp = b.warp[t.warp];
  const unsigned me = 1u << t.lane;
  warp.ready &= ~me;
  warp.alive &= ~me;
  for (int i = 0; i < warp.meetings; ++i) {
    const Meeting& meeting = warp.meeting[i];
    if (meeting.arrived != 0 && (meeting.mask & me) != 0)
      fail("the thread returns while lanes %08x wait for it in %s, mask %08x", meeting.arrived, meeting.name,
           meeting.mask);
  }
  if (b.waiting_at_barriers > 0) release_barrier_of_all(b);  // which counts the threads that are left
}

/// Where fibers begin. A thread that never waits costs no switch: the next one begins on the same stack.
void thread_entry() {
  enter_fiber();
  for (;;) {
    Block& b = *current_block;
    Thread& me = *current_thread;
    happens_after(&b.start_token);
    b.body.call(b.body.object);
    happens_before(&b.end_token);
    ignore_accesses(true);
    finish(b, me);
    Thread* next = next_thread(b, &me);
    current_thread = next;
    if (!kTsan && next != nullptr && !next->started) {
      next->started = true;
      next->fiber = me.fiber;
      continue;
    }
    if (!kTsan) b.stacks.give(me.fiber.stack);
    if (next != nullptr && !next->started) begin(b, *next);
    ignore_accesses(false);
    leave_fiber(next != nullptr ? next->fiber : b.os_thread);
  }
}
}  // namespace

void make_ready(Thread& thread) {
  thread.state = Thread::State::ready;
  current_block->warp[thread.warp].ready |= 1u << thread.lane;
}

void suspend(Thread::State state, const Operation& operation) {
  Block& b = *current_block;
  Thread& me = *current_thread;
  if (state != Thread::State::ready) {
    me.state = state;
    me.operation = operation;
    b.warp[me.warp].ready &= ~(1u << me.lane);
  }
  Thread* next = next_thread(b, &me);
  if (next == &me) return;
  if (!next->started) begin(b, *next);
  current_thread = next;
  switch_fiber(me.fiber, next->fiber);
}

// ------------------------------------------------------------------------------------------- a block, whole
Block::Block() {
  void* arena = std::aligned_alloc(1024, kArenaBytes);
  if (arena == nullptr) fail("no memory for shared memory");
  shared = static_cast<unsigned char*>(arena);
  os_thread.adopt_os_thread();
  explain_crashes();
  use_signal_stack();
}

Block::~Block() {
#if CUDA_ON_CPU_ASAN
  __asan_unpoison_memory_region(shared, kArenaBytes);
#endif
  std::free(shared);
}

namespace {
/// Poisons shared memory: a kernel finds NaN where it has not written, and a fence behind the last byte.
void prepare_shared(Block& b) {
#if CUDA_ON_CPU_ASAN
  __asan_unpoison_memory_region(b.shared, b.shared_bytes);
#endif
  std::memset(b.shared, kPoisonByte, b.shared_bytes);
#if CUDA_ON_CPU_ASAN
  __asan_poison_memory_region(b.shared + b.shared_bytes, kArenaBytes - b.shared_bytes);
#else
  std::memset(b.shared + b.shared_bytes, kRedzoneByte, kRedzone);
#endif
  poison_static_shared(b.kernel);
}

void check_shared(const Block& b) {
  if (kAsan) return;
  for (size_t i = 0; i < kRedzone; ++i)
    if (b.shared[b.shared_bytes + i] != kRedzoneByte)
      fail("the block wrote %zu bytes past the end of its %zu bytes of dynamic shared memory", i + 1,
           b.shared_bytes);
}

void prepare_threads(Block& b) {
  b.alive = b.threads;
  b.polling = b.waiting_at_barriers = 0;
  for (int w = 0; w < b.warps; ++w) {
    const int lanes = std::min(kLanes, b.threads - w * kLanes);
    b.warp[w].alive = b.warp[w].ready = lanes == kLanes ? ~0u : (1u << lanes) - 1;
    b.warp[w].meetings = 0;
  }
  for (Barrier& barrier : b.barrier) barrier = {};
  uint3 index{0, 0, 0};
  for (int i = 0; i < b.threads; ++i) {
    Thread& t = b.thread[i];
    t.index = index;
    t.number = i;
    t.lane = i % kLanes;
    t.warp = i / kLanes;
    t.state = Thread::State::ready;
    t.started = false;
    t.fiber.announce();
    if (++index.x < b.size.x) continue;
    index.x = 0;
    if (++index.y < b.size.y) continue;
    index.y = 0;
    ++index.z;
  }
}
}  // namespace

void Block::run(uint3 block_index) {
  const Unobserved unobserved;
  index = block_index;
  current_block = this;
  prepare_shared(*this);
  prepare_threads(*this);
  random = order.seed * 2654435761u + index.x + 1;
  current_thread = pick(*this, nullptr);
  begin(*this, *current_thread);
  happens_before(&start_token);
  switch_fiber(os_thread, current_thread->fiber);
  happens_after(&end_token);
  current_thread = nullptr;
  if (!engine.empty()) fail("the block ended before a TMA copy that it started arrived");
  check_shared(*this);
  current_block = nullptr;
}

}  // namespace cuda_on_cpu
