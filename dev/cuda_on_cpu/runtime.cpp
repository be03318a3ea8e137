#include "dev/cuda_on_cpu/runtime.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "dev/cuda_on_cpu/block.h"
#include "dev/cuda_on_cpu/device_memory.h"
#include "dev/cuda_on_cpu/streams.h"

using cuda_on_cpu::DeviceAccess;
using cuda_on_cpu::MemoryKind;
using cuda_on_cpu::refuse;
using cuda_on_cpu::report;

// --------------------------------------------------------------------------------------------------- errors
namespace {
thread_local cudaError_t last_error = cudaSuccess;

struct ErrorText {
  cudaError_t error;
  const char *name, *words;
};
constexpr ErrorText kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {cudaErrorStreamCaptureUnmatched, "cudaErrorStreamCaptureUnmatched",
     "the capture was not initiated in this stream"},
    {cudaErrorStreamCaptureUnjoined, "cudaErrorStreamCaptureUnjoined", "capturing stream has unjoined work"},
    {cudaErrorStreamCaptureIsolation, "cudaErrorStreamCaptureIsolation",
     "dependency created on uncaptured work in another stream"},
    {cudaErrorStreamCaptureImplicit, "cudaErrorStreamCaptureImplicit",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {cudaErrorCapturedEvent, "cudaErrorCapturedEvent",
     "operation not permitted on an event last recorded in a capturing stream"},
    {cudaErrorGraphExecUpdateFailure, "cudaErrorGraphExecUpdateFailure",
     "the graph update was not performed because it included changes which violated constraints specific to "
     "instantiated graph update"},
};

const ErrorText* find(cudaError_t error) {
  for (const ErrorText& text : kErrors)
    if (text.error == error) return &text;
  return nullptr;
}
}  // namespace

cudaError_t cuda_on_cpu::report(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}
cudaError_t cuda_on_cpu::refuse(cudaError_t error, const char* why, ...) {
  std::fprintf(stderr, "cuda_on_cpu: %s: ", cudaGetErrorName(error));
  va_list arguments;
  va_start(arguments, why);
  std::vfprintf(stderr, why, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  return report(error);
}

const char* cudaGetErrorName(cudaError_t error) {
  const ErrorText* text = find(error);
  return text != nullptr ? text->name : "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) {
  const ErrorText* text = find(error);
  return text != nullptr ? text->words : "unrecognized error code";
}
cudaError_t cudaPeekAtLastError() {
  return last_error;
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

// --------------------------------------------------------------------------------------------------- device
namespace {
constexpr int kMultiprocessors = 4;
thread_local int current_device = 0;

int device_count() {
  const char* wish = std::getenv("CUDA_ON_CPU_DEVICES");
  return wish != nullptr ? std::atoi(wish) : 1;
}
bool is_device(int device) {
  return device >= 0 && device < device_count();
}
}  // namespace

cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count();
  return report(*count > 0 ? cudaSuccess : cudaErrorNoDevice);
}
cudaError_t cudaSetDevice(int device) {
  if (!is_device(device)) return report(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int bytes, int device) {
  if (!is_device(device) || bytes < 13) return report(cudaErrorInvalidValue);
  std::snprintf(id, static_cast<size_t>(bytes), "0000:%02x:00.0", static_cast<unsigned>(device) & 0xff);
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (!is_device(device)) return report(cudaErrorInvalidDevice);
  *properties = {};
  std::strcpy(properties->name, "CUDA on CPU");
  properties->totalGlobalMem = cuda_on_cpu::kDeviceBytes;
  properties->sharedMemPerBlock = 48 << 10;
  properties->sharedMemPerBlockOptin = cuda_on_cpu::kMaxDynamicShared;
  properties->sharedMemPerMultiprocessor = 228 << 10;
  properties->regsPerBlock = 65536;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = 0x7fffffff;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->major = 9;
  properties->multiProcessorCount = kMultiprocessors;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->l2CacheSize = 50 << 20;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (!is_device(device)) return report(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = 32;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = kMultiprocessors;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = 50 << 20;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(cuda_on_cpu::kMaxDynamicShared);
      return cudaSuccess;
    case cudaDevAttrClockRate:  // kHz; made up, like everything about speed here
    case cudaDevAttrMemoryClockRate:
      *value = 1000000;
      return cudaSuccess;
    case cudaDevAttrGlobalMemoryBusWidth:
      *value = 64;
      return cudaSuccess;
  }
  return report(cudaErrorInvalidValue);
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

// --------------------------------------------------------------------------------------------------- memory
namespace {
/// Page-locked host memory: its blocks, by their addresses.
struct PageLocked {
  std::mutex mutex;
  std::map<const char*, size_t> blocks;
};
PageLocked& page_locked() {
  static PageLocked* blocks = new PageLocked;  // never destroyed: others' destructors free buffers
  return *blocks;
}

bool is_page_locked(const void* address, size_t bytes) {
  PageLocked& p = page_locked();
  const std::lock_guard lock(p.mutex);
  const auto* at = static_cast<const char*>(address);
  const auto after = p.blocks.upper_bound(at);
  if (after == p.blocks.begin()) return false;
  const auto& [block, size] = *std::prev(after);
  return at + bytes <= block + size;
}

/// Host memory that the system may move or the program free while a copy waits for its turn.
bool is_pageable(const void* address, size_t bytes) {
  return cuda_on_cpu::classify(address, bytes) == MemoryKind::host && !is_page_locked(address, bytes);
}
}  // namespace

cudaError_t cudaMalloc(void** block, size_t bytes) {
  if (const cudaError_t error = cuda_on_cpu::check_unsafe("cudaMalloc")) return error;
  *block = cuda_on_cpu::allocate_device(bytes);
  return report(*block != nullptr ? cudaSuccess : cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void* block) {
  if (block == nullptr) return cudaSuccess;
  if (const cudaError_t error = cuda_on_cpu::check_unsafe("cudaFree")) return error;
  finish(cuda_on_cpu::Which::all);
  return report(cuda_on_cpu::free_device(block) ? cudaSuccess : cudaErrorInvalidValue);
}
cudaError_t cudaMallocHost(void** block, size_t bytes) {
  if (const cudaError_t error = cuda_on_cpu::check_unsafe("cudaMallocHost")) return error;
  *block = std::aligned_alloc(4096, (bytes + 4096) / 4096 * 4096);
  if (*block == nullptr) return report(cudaErrorMemoryAllocation);
  std::memset(*block, cuda_on_cpu::kPoisonByte, bytes);
  const std::lock_guard lock(page_locked().mutex);
  page_locked().blocks[static_cast<char*>(*block)] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* block) {
  if (block == nullptr) return cudaSuccess;
  if (const cudaError_t error = cuda_on_cpu::check_unsafe("cudaFreeHost")) return error;
  finish(cuda_on_cpu::Which::all);
  {
    const std::lock_guard lock(page_locked().mutex);
    if (page_locked().blocks.erase(static_cast<char*>(block)) == 0) return report(cudaErrorInvalidValue);
  }
  std::free(block);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = cuda_on_cpu::kDeviceBytes;
  *free = *total - cuda_on_cpu::device_bytes_in_use();
  return cudaSuccess;
}

namespace {
/// True when the kinds of memory are what the caller says, and all of it lies in allocations.
bool copy_is_legal(const void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  const MemoryKind there = cuda_on_cpu::classify(to, bytes), here = cuda_on_cpu::classify(from, bytes);
  if (there == MemoryKind::bad || here == MemoryKind::bad) return false;
  if (kind == cudaMemcpyDefault) return true;
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  return (there == MemoryKind::device) == to_device && (here == MemoryKind::device) == from_device;
}

void copy(void* to, const void* from, size_t bytes) {
  const DeviceAccess access(DeviceAccess::From::copy);
  std::memmove(to, from, bytes);
}
}  // namespace

/// Pageable memory is what it is now when it is read, and what was copied when the call returns.
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  if (!copy_is_legal(to, from, bytes, kind)) return report(cudaErrorInvalidValue);
  const bool reads_pageable = is_pageable(from, bytes), writes_pageable = is_pageable(to, bytes);
  cuda_on_cpu::Work work = [=] { copy(to, from, bytes); };
  if (reads_pageable && !writes_pageable && stream != nullptr && !cuda_on_cpu::eager()) {
    const auto* first = static_cast<const char*>(from);
    work = [to, staged = std::vector<char>(first, first + bytes)] { copy(to, staged.data(), staged.size()); };
  }
  const cudaError_t error =
      cuda_on_cpu::enqueue("cudaMemcpyAsync", stream, std::move(work), reads_pageable || writes_pageable);
  if (error == cudaSuccess && writes_pageable && stream != nullptr) stream->queue.finish();
  return error;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (const cudaError_t error = cuda_on_cpu::check_unsafe("cudaMemcpy")) return error;
  return cudaMemcpyAsync(to, from, bytes, kind);
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  if (cuda_on_cpu::classify(to, bytes) != MemoryKind::device) return report(cudaErrorInvalidValue);
  return cuda_on_cpu::enqueue("cudaMemsetAsync", stream, [=] {
    const DeviceAccess access(DeviceAccess::From::copy);
    std::memset(to, value, bytes);
  });
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  if (const cudaError_t error = cuda_on_cpu::check_unsafe("cudaMemset")) return error;
  return cudaMemsetAsync(to, value, bytes);
}
