// One block of CUDA threads, run by one OS thread: who is ready, who waits for what, who runs next.
//
// Threads change only inside synchronising calls, so a schedule is repeatable, and the order in which ready
// threads are picked can be chosen (order.h) to bring missing barriers to light.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <source_location>
#include <string>
#include <vector>

#include "dev/cuda_on_cpu/async.h"
#include "dev/cuda_on_cpu/fibers.h"
#include "dev/cuda_on_cpu/vector_types.h"

namespace cuda_on_cpu {

inline constexpr int kLanes = 32, kMaxThreads = 1024, kMaxWarps = kMaxThreads / kLanes;
inline constexpr int kNamedBarriers = 16, kMaxWarpgroups = kMaxThreads / 128;
inline constexpr size_t kMaxDynamicShared = 227 << 10;  // static shared memory included
inline constexpr size_t kMaxUnaskedShared = 48 << 10;   // the same without cudaFuncSetAttribute
inline constexpr size_t kMaxDynamicUnasked = 32 << 10;  // dynamic alone: launch() asks above this

/// Prints "cuda_on_cpu: <message>" with the kernel, block and thread that run, and aborts.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);
/// Fails unless the address is a multiple of `bytes`, which a GPU needs for this operation.
inline void check_aligned(const void* address, size_t bytes, const char* operation) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
    fail("%s: address %p is not aligned to %zu bytes", operation, address, bytes);
}

/// Prints which kernel, block and thread run, if any.
void print_place();

/// What a thread waits in, for reports.
struct Operation {
  const char* name;
  std::source_location where = std::source_location::current();
};

struct Thread {
  uint3 index{};  // threadIdx
  int number = 0, lane = 0, warp = 0;
  enum class State : uint8_t { ready, in_warp, at_barrier, polling, finished } state = State::ready;
  bool started = false;
  Fiber fiber;

  // What it waits for, unless it is ready.
  Operation operation{""};
  unsigned mask = 0;                             // in_warp: the lanes that must come
  int barrier = 0;                               // at_barrier
  const std::function<bool()>* until = nullptr;  // polling
  std::function<std::string()> explain;          // polling: more words for a deadlock report

  CopyQueue copies;       // cp.async
  ProductQueue products;  // wgmma
};

/// What lanes bring to a warp operation, and what its last lane computes for all.
struct alignas(64) Deposits {
  static constexpr size_t kBytes = 32;
  unsigned char bytes[kLanes][kBytes];
  float results[kLanes][4];

  template <typename V>
  V of(int lane) const {
    static_assert(sizeof(V) <= kBytes);
    V value;
    __builtin_memcpy(static_cast<void*>(&value), bytes[lane], sizeof value);
    return value;
  }
};

/// The lanes of one mask on their way into one operation. Deposits alternate: a fast lane may be in the next
/// operation while a slow one still reads the last.
struct Meeting {
  unsigned mask = 0, arrived = 0, turn = 0;
  const char* name = "";
  Deposits deposits[2];
};

struct Warp {
  static constexpr int kMeetings = 33;  // distinct masks in one kernel
  unsigned ready = 0, alive = 0;
  int meetings = 0;
  Meeting meeting[kMeetings];
};

struct Barrier {
  int arrived = 0, expected = 0;
  unsigned generation = 0;
  // By generation modulo 2: a thread that is still on its way out must not see what the next round brings.
  int votes[2] = {};
  char tokens[2] = {};  // for happens_before
};

/// A kernel's body, called once per thread.
struct Body {
  void* object;
  void (*call)(void*);
};

/// Which of the ready threads runs next.
struct ThreadOrder {
  enum class Kind : uint8_t { forward, reverse, random } kind = Kind::forward;
  uint64_t seed = 1;
};

struct Block {
  dim3 grid{}, size{};
  uint3 index{};  // blockIdx
  const void* kernel = nullptr;
  ThreadOrder order;
  Body body{};
  int threads = 0, warps = 0, alive = 0, polling = 0, waiting_at_barriers = 0;
  Thread thread[kMaxThreads];
  Warp warp[kMaxWarps];
  Barrier barrier[kNamedBarriers + kMaxWarpgroups];  // the numbered ones of CUDA, then one per warpgroup
  unsigned char* shared = nullptr;                   // dynamic shared memory
  size_t shared_bytes = 0;
  std::deque<std::function<void()>> engine;  // copies that the hardware makes by itself (TMA), oldest first
  Fiber os_thread;
  StackPool stacks;
  uint64_t random = 1;
  char start_token = 0, end_token = 0;  // for happens_before

  Block();
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  void run(uint3 block_index);
};

// The block and thread that run on this OS thread; null outside of kernels.
extern thread_local constinit Block* current_block;
extern thread_local constinit Thread* current_thread;

/// Marks the running thread as waiting, runs others until somebody makes it ready again.
void suspend(Thread::State state, const Operation& operation);
void make_ready(Thread& thread);

}  // namespace cuda_on_cpu
