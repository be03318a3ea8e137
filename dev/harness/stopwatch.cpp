#include "dev/harness/stopwatch.h"

#include <chrono>
#include <cstring>

#include "model/kernels/simd.h"

namespace {
constexpr int64_t kBeyondAnyCpuCache = int64_t{256} << 20;

int64_t eviction_bytes(const Context& ctx) {
  if constexpr (kHaveGpu)
    if (ctx.where == Where::gpu) return gpu::eviction_bytes(*ctx.device);
  return kBeyondAnyCpuCache;
}
}  // namespace

Stopwatch::Stopwatch(Context& ctx) : ctx_(ctx), evicted_(ctx, eviction_bytes(ctx), "eviction") {}

double Stopwatch::seconds(const std::function<void()>& body) {
  if constexpr (kHaveGpu)
    if (ctx_.where == Where::gpu) return gpu::event_seconds(*ctx_.device, evicted_, body);
  auto* memory = reinterpret_cast<float*>(evicted_.data());
  parallel_for(ctx_, evicted_.bytes() / 4, 4096, [=](int64_t begin, int64_t end, int) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) memory[i] += 1.0f;
  });
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  body();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

void copy_tensor(Context& ctx, const Tensor& to, const Tensor& from) {
  expect_shape(to, from.shape, "copy_tensor: to");
  if constexpr (kHaveGpu)
    if (ctx.where == Where::gpu) return gpu::copy_on_device(*ctx.device, to.data, from.data, from.bytes());
  const auto* source = static_cast<const char*>(from.data);
  auto* target = static_cast<char*>(to.data);
  parallel_for(ctx, from.bytes(), 1 << 16, [=](int64_t begin, int64_t end, int) {
    std::memcpy(target + begin, source + begin, static_cast<size_t>(end - begin));
  });
}
