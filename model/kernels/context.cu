#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "model/kernels/cuda.h"
#ifdef __CUDACC__
#include <nvtx3/nvToolsExt.h>
#endif

namespace {
/// What to do about the errors that users meet.
const char* hint(cudaError_t status) {
  switch (status) {
    case cudaErrorMemoryAllocation:
      return "use a smaller model or batch";
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
      return "check the driver with nvidia-smi, or use --device cpu";
    case cudaErrorNoKernelImageForDevice:
      return "this GPU is older than the ones that the program was built for (compute capability 8.0)";
    default:
      return "run with CUDA_LAUNCH_BLOCKING=1 or compute-sanitizer to find the place";
  }
}
}  // namespace

void cuda_check(cudaError_t status, const char* call, std::source_location where) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status) + ", " + where.file_name() +
                           ":" + std::to_string(where.line()) + ", " + hint(status));
}

gpu::Device::Device(int index) : index(index) {
  CUDA_CHECK(cudaSetDevice(index));
  CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CUDA_CHECK(cudaStreamCreateWithFlags(&copy_stream, cudaStreamNonBlocking));
  cudaDeviceProp properties;
  CUDA_CHECK(cudaGetDeviceProperties(&properties, index));
  multiprocessors = properties.multiProcessorCount;
  compute_capability = 10 * properties.major + properties.minor;
}

gpu::Device::~Device() {
  gemm.reset();
  cudaStreamDestroy(copy_stream);
  cudaStreamDestroy(stream);
}

int gpu::count() {
#ifndef __CUDACC__
  // The executor is for those who ask for it, by --device or by its number of GPUs.
  if (std::getenv("CUDA_ON_CPU_DEVICES") == nullptr) return 0;
#endif
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // that there is no driver is an answer, not a failure
  return 0;
}

std::shared_ptr<gpu::Device> gpu::open(int index) {
  return std::make_shared<Device>(index);
}

gpu::DeviceInfo gpu::info(Device& device) {
  cudaDeviceProp properties;
  CUDA_CHECK(cudaGetDeviceProperties(&properties, device.index));
  size_t free = 0, total = 0;
  CUDA_CHECK(cudaMemGetInfo(&free, &total));
  return {.name = properties.name,
          .memory_bytes = static_cast<int64_t>(total),
          .free_bytes = static_cast<int64_t>(free),
          .multiprocessors = device.multiprocessors,
          .compute_capability = device.compute_capability};
}

char* gpu::allocate(Device& device, int64_t bytes, const char* what) {
  void* block = nullptr;
  if (cudaMalloc(&block, static_cast<size_t>(bytes)) != cudaSuccess) {
    cudaGetLastError();  // the failure is reported here, not by the next call
    throw std::runtime_error(
        "not enough GPU memory for " + std::string(what) + ", " + std::to_string(bytes >> 20) + " MiB of " +
        std::to_string(info(device).free_bytes >> 20) + " free, use a smaller model or batch");
  }
  CUDA_CHECK(cudaMemsetAsync(block, 0, static_cast<size_t>(bytes), device.stream));
  return static_cast<char*>(block);
}

void gpu::release(Device& device, char* block) {
  cudaStreamSynchronize(device.stream);  // work that is still enqueued may use it
  cudaFree(block);
}

char* gpu::allocate_pinned(Device&, int64_t bytes) {
  void* block = nullptr;
  CUDA_CHECK(cudaMallocHost(&block, static_cast<size_t>(bytes)));
  std::memset(block, 0, static_cast<size_t>(bytes));
  return static_cast<char*>(block);
}

void gpu::release_pinned(Device& device, char* block) {
  cudaStreamSynchronize(device.stream);
  cudaStreamSynchronize(device.copy_stream);
  cudaFreeHost(block);
}

void gpu::copy_in(Device& device, void* to, const void* from_host, int64_t bytes) {
  CUDA_CHECK(
      cudaMemcpyAsync(to, from_host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, device.stream));
  CUDA_CHECK(cudaStreamSynchronize(device.stream));
}

void gpu::copy_out(Device& device, void* to_host, const void* from, int64_t bytes) {
  CUDA_CHECK(
      cudaMemcpyAsync(to_host, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, device.stream));
  CUDA_CHECK(cudaStreamSynchronize(device.stream));
}

void gpu::synchronize(Device& device) {
  CUDA_CHECK(cudaStreamSynchronize(device.stream));
}

#ifdef __CUDACC__
void gpu::begin_range(const char* name) {
  nvtxRangePushA(name);
}
void gpu::end_range() {
  nvtxRangePop();
}
#else
void gpu::begin_range(const char*) {}
void gpu::end_range() {}
#endif
