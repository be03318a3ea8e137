// The executor's device memory: one range of addresses, which host code cannot touch.
#pragma once

#include <cstddef>

namespace cuda_on_cpu {

/// While on (it is from the start, unless CUDA_ON_CPU_GUARD=0 is in the environment), device memory is out of
/// reach unless a kernel or copy runs: host code that reads or writes it dies with a message. To keep many
/// small launches fast, more than kEagerGuardBytes of device memory are only closed after copies, memsets and
/// synchronising calls, not after every kernel.
void guard_device_memory(bool on);
inline constexpr size_t kEagerGuardBytes = 1 << 20;

// ----------------------------------------------------------------------------------------- for the executor

inline constexpr size_t kDeviceBytes = size_t{8} << 30;

/// Filled with NaN, aligned to 256 bytes; null when there is not enough. The end lies at the end of a page
/// (up to rounding), behind which nothing can be accessed.
void* allocate_device(size_t bytes);
/// Pinned host memory comes from elsewhere. False when `block` was not allocated here or is already freed;
/// dies when something was written before or just behind it.
bool free_device(void* block);
size_t device_bytes_in_use();

enum class MemoryKind { host, device, bad };  // bad: device addresses that are not inside one allocation
MemoryKind classify(const void* address, size_t bytes);

/// For the handler of segmentation faults: opens the allocation around an address and returns true when
/// device memory may be touched now; false when the fault is one.
bool open_touched(const void* address);
/// For crash reports: true for all addresses that allocations may have; and the allocation around one, on
/// standard error.
bool is_device_address(const void* address);
void explain_device_address(const void* address);

/// Device memory is within reach while one of these lives.
class DeviceAccess {
 public:
  enum class From { kernel, copy };
  explicit DeviceAccess(From from);
  ~DeviceAccess();
  DeviceAccess(const DeviceAccess&) = delete;
  DeviceAccess& operator=(const DeviceAccess&) = delete;

 private:
  From from_;
};
/// What a synchronising call does: all work is over.
void close_device_memory();

}  // namespace cuda_on_cpu
