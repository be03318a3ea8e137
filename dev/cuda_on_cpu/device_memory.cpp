#include "dev/cuda_on_cpu/device_memory.h"

#include <execinfo.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "dev/cuda_on_cpu/block.h"
#include "dev/cuda_on_cpu/crash.h"
#include "dev/cuda_on_cpu/symbols.h"

#if CUDA_ON_CPU_ASAN
#include <sanitizer/asan_interface.h>
#endif

// Each allocation has pages of its own and a closed page behind it:
//
//   | canary ... | the caller's bytes | canary to a multiple of 256 | closed page |
//                ^ aligned to 256                                 ^ end of a page
//
// Addresses are not used again before the whole range has been used once, so that a stale pointer meets a
// closed page rather than the next tensor.
//
// "Open" means that device memory may be touched. The pages of an allocation follow when it is: a kernel uses
// a few of the hundreds that a model has, and opening all of them at each launch took a third of the time of
// whole-model tests. Not in race checks, where the lock that this takes would order CUDA threads.

namespace cuda_on_cpu {
namespace {
constexpr size_t kRangeBytes = size_t{64} << 30, kPage = 4096, kAlign = 256;
constexpr int kCanary = 0xca;

struct Allocation {
  char* block;
  size_t bytes;
  char *pages, *pages_end;
  bool open;  // its pages
  int number;
  void* callers[6];
  int depth;
};

struct DeviceMemory {
  std::mutex mutex;
  char *range = nullptr, *cursor = nullptr;
  std::map<const char*, Allocation> allocations;  // by pages_end: upper_bound finds the one around an address
  size_t in_use = 0;
  int count = 0, users = 0;
  bool guard = true, open = true;
};

DeviceMemory& memory() {
  static DeviceMemory* memory = new DeviceMemory;  // never destroyed: others' destructors free tensors
  return *memory;
}

size_t round_up(size_t n, size_t to) {
  return (n + to - 1) / to * to;
}

void print_callers(const Allocation& a) {
  const int frames = std::min(a.depth, 5);
  for (int i = 2; i < frames; ++i)  // past allocate_device and cudaMalloc
    std::fprintf(stderr, "cuda_on_cpu:     by %s\n", function_around(a.callers[i]).c_str());
}

// --------------------------------------------------------------------------------------------- open, closed
void set_pages(char* from, char* to, bool open) {
  mprotect(from, static_cast<size_t>(to - from), open ? PROT_READ | PROT_WRITE : PROT_NONE);
}

void set_pages(Allocation& a, bool open) {
  if (a.open != open) set_pages(a.pages, a.pages_end, open);
  a.open = open;
}

void set_open(DeviceMemory& m, bool open) {
  if (m.open == open) return;
  m.open = open;
  if (open && !kTsan) return;  // open_touched()
  for (auto& [end, a] : m.allocations) set_pages(a, open);
}

/// After a change: closes all that may be closed.
void close_unless_used(DeviceMemory& m) {
  if (m.guard && m.users == 0) set_open(m, false);
}

/// Pages of allocations count as worth dumping and those between them do not: with unequal flags the kernel
/// need not join a closed allocation with its neighbours, only to split them at the next opening.
void set_apart(void* pages, size_t bytes, bool allocated) {
  madvise(pages, bytes, allocated ? MADV_DODUMP : MADV_DONTDUMP);
}

void start(DeviceMemory& m) {
  void* range = mmap(nullptr, kRangeBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (range == MAP_FAILED) fail("no addresses for device memory");
  set_apart(range, kRangeBytes, false);
  m.range = m.cursor = static_cast<char*>(range);
  explain_crashes();
  if (const char* wish = std::getenv("CUDA_ON_CPU_GUARD")) m.guard = std::atoi(wish) != 0;
}

/// Addresses for `bytes` bytes of pages and a closed page; null when there is no gap that large.
char* find_gap(DeviceMemory& m, size_t bytes) {
  for (int round = 0; round < 2; ++round) {
    for (auto next = m.allocations.upper_bound(m.cursor);; ++next) {
      char* limit = next == m.allocations.end() ? m.range + kRangeBytes : next->second.pages;
      if (m.cursor + bytes + kPage <= limit) return m.cursor;
      if (next == m.allocations.end()) break;
      m.cursor = next->second.pages_end + kPage;
    }
    m.cursor = m.range;
  }
  return nullptr;
}

void set_canaries(const Allocation& a) {
  std::memset(a.pages, kCanary, static_cast<size_t>(a.block - a.pages));
  std::memset(a.block + a.bytes, kCanary, static_cast<size_t>(a.pages_end - a.block) - a.bytes);
#if CUDA_ON_CPU_ASAN
  __asan_poison_memory_region(a.pages, static_cast<size_t>(a.block - a.pages));
  __asan_poison_memory_region(a.block + a.bytes, static_cast<size_t>(a.pages_end - a.block) - a.bytes);
#endif
}

void check_canaries(const Allocation& a) {
  const auto check = [&](const char* from, const char* to) {
    for (const char* p = from; p < to; ++p) {
      if (static_cast<unsigned char>(*p) == kCanary) continue;
      std::fprintf(stderr, "cuda_on_cpu: device memory was written out of bounds, at %p\n",
                   static_cast<const void*>(p));
      explain_device_address(p);
      fail("device memory was written out of bounds");
    }
  };
#if CUDA_ON_CPU_ASAN
  __asan_unpoison_memory_region(a.pages, static_cast<size_t>(a.pages_end - a.pages));
#endif
  check(a.pages, a.block);
  check(a.block + a.bytes, a.pages_end);
}
}  // namespace

void* allocate_device(size_t bytes) {
  DeviceMemory& m = memory();
  const std::lock_guard lock(m.mutex);
  if (m.range == nullptr) start(m);
  if (bytes > kDeviceBytes - m.in_use) return nullptr;
  const size_t room = round_up(std::max<size_t>(bytes, 1), kAlign), pages = round_up(room, kPage);
  char* at = find_gap(m, pages);
  if (at == nullptr) return nullptr;
  if (mprotect(at, pages, PROT_READ | PROT_WRITE) != 0) return nullptr;
  set_apart(at, pages, true);
  Allocation a{at + pages - room, bytes, at, at + pages, true, ++m.count, {}, 0};
  a.depth = backtrace(a.callers, std::size(a.callers));
  std::memset(a.block, kPoisonByte, bytes);
  set_canaries(a);
  m.allocations.emplace(a.pages_end, a);
  m.cursor = a.pages_end + kPage;
  m.in_use += bytes;
  m.open = true;
  close_unless_used(m);
  return a.block;
}

bool free_device(void* block) {
  DeviceMemory& m = memory();
  const std::lock_guard lock(m.mutex);
  const auto found = m.allocations.upper_bound(static_cast<char*>(block));
  if (found == m.allocations.end() || found->second.block != block) return false;
  set_pages(found->second, true);
  const Allocation a = found->second;
  check_canaries(a);
  m.allocations.erase(found);
  m.in_use -= a.bytes;
  madvise(a.pages, static_cast<size_t>(a.pages_end - a.pages), MADV_DONTNEED);
  set_pages(a.pages, a.pages_end, false);
  set_apart(a.pages, static_cast<size_t>(a.pages_end - a.pages), false);
  close_unless_used(m);
  return true;
}

bool open_touched(const void* address) {
  DeviceMemory& m = memory();
  const std::lock_guard lock(m.mutex);
  const char* at = static_cast<const char*>(address);
  const auto found = m.allocations.upper_bound(at);
  if (!m.open || found == m.allocations.end() || at < found->second.pages) return false;
  set_pages(found->second, true);  // another thread may have come first
  return true;
}

bool is_device_address(const void* address) {
  const char* range = memory().range;
  return range != nullptr && address >= range && address < range + kRangeBytes;
}

void explain_device_address(const void* where) {
  const char* address = static_cast<const char*>(where);
  for (const auto& [end, a] : memory().allocations) {
    if (address < a.pages || address >= a.pages_end + kPage) continue;
    const ptrdiff_t offset = address - a.block;
    const auto bytes = static_cast<ptrdiff_t>(a.bytes);
    const char* place = offset < 0        ? "bytes before"
                        : offset >= bytes ? "bytes past the end of"
                                          : "bytes from the beginning of";
    std::fprintf(stderr, "cuda_on_cpu:   %td %s allocation %d, %td bytes, made\n",
                 offset < 0        ? -offset
                 : offset >= bytes ? offset - bytes
                                   : offset,
                 place, a.number, bytes);
    return print_callers(a);
  }
  std::fputs("cuda_on_cpu:   it is in no allocation: freed, or never allocated\n", stderr);
}

size_t device_bytes_in_use() {
  DeviceMemory& m = memory();
  const std::lock_guard lock(m.mutex);
  return m.in_use;
}

MemoryKind classify(const void* address, size_t bytes) {
  DeviceMemory& m = memory();
  const std::lock_guard lock(m.mutex);
  const char* at = static_cast<const char*>(address);
  if (m.range == nullptr || at < m.range || at >= m.range + kRangeBytes) return MemoryKind::host;
  const auto found = m.allocations.upper_bound(at);
  if (found == m.allocations.end()) return MemoryKind::bad;
  const Allocation& a = found->second;
  return at >= a.block && at + bytes <= a.block + a.bytes ? MemoryKind::device : MemoryKind::bad;
}

void guard_device_memory(bool on) {
  DeviceMemory& m = memory();
  const std::lock_guard lock(m.mutex);
  if (m.range == nullptr) start(m);
  m.guard = on;
  set_open(m, !on || m.users > 0);
}

DeviceAccess::DeviceAccess(From from) : from_(from) {
  DeviceMemory& m = memory();
  const std::lock_guard lock(m.mutex);
  ++m.users;
  set_open(m, true);
}

DeviceAccess::~DeviceAccess() {
  DeviceMemory& m = memory();
  const std::lock_guard lock(m.mutex);
  if (--m.users > 0 || !m.guard) return;
  if (from_ == From::copy || m.in_use <= kEagerGuardBytes) set_open(m, false);
}

void close_device_memory() {
  DeviceMemory& m = memory();
  const std::lock_guard lock(m.mutex);
  if (m.range != nullptr) close_unless_used(m);
}

}  // namespace cuda_on_cpu
