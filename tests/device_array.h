// Memory and launches for tests that call kernels of their own, in the executor or on a GPU.
#pragma once

#include <vector>

#include "model/kernels/cuda.h"

/// An array on the device; NaN or garbage until it is written.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    void* block = nullptr;
    CUDA_CHECK(cudaMalloc(&block, count * sizeof(T)));
    data_ = static_cast<T*>(block);
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    CUDA_CHECK(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
    // Such a copy may come back before it has arrived, and the stream of kernels does not wait for this one.
    CUDA_CHECK(cudaDeviceSynchronize());
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return data_; }
  std::vector<T> values() const {
    std::vector<T> values(count_);
    CUDA_CHECK(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t count_;
};

/// Launches a kernel and waits for it.
template <typename... Parameters, typename... Arguments>
void run_kernel(const Launch& how, void (*kernel)(Parameters...), Arguments... arguments) {
  Context ctx;
  use_gpu(ctx, 0, DType::f32);
  launch(ctx, how, kernel, arguments...);
  gpu::synchronize(*ctx.device);
}
