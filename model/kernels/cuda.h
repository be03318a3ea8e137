// The one header of CUDA that kernel files include. The same source compiles with nvcc for GPUs and with g++
// for the executor of dev/cuda_on_cpu, which runs it on the CPU under test.
//
// What a kernel file may use: the CUDA language (grids, blocks, shared memory, warp intrinsics with explicit
// masks, vector types), what stands here, mma.h for tensor cores and asynchronous copies, hopper.h for TMA
// and wgmma, fast_math.h for approximate functions. No raw asm, no <<<>>>, no libraries.
//
//   template <typename T>
//   __global__ void gelu_kernel(T* y, const T* x, int64_t n) { ... }
//   launch(ctx, {.grid = blocks_for(n, 256), .block = 256}, gelu_kernel<T>, y, x, n);
//
// Dynamic shared memory: DYN_SHARED(float, tile) inside the kernel, .shared = bytes in the launch.
#pragma once

#include <cstdint>
#include <functional>
#include <source_location>
#include <tuple>
#include <type_traits>

#include "model/kernels/context.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#define DYN_SHARED(T, name)                                          \
  extern __shared__ __align__(1024) unsigned char dynamic_shared_[]; \
  T* name = reinterpret_cast<T*>(dynamic_shared_)
#else
#include "dev/cuda_on_cpu/cuda_on_cpu.h"
#endif

using bf16 = __nv_bfloat16;

// ------------------------------------------------------------------------------------------------- host side

/// Throws std::runtime_error "<call>: <CUDA's words>, <file>:<line>, <hint>" unless the call succeeded.
void cuda_check(cudaError_t status, const char* call, std::source_location where);
#define CUDA_CHECK(call) cuda_check((call), #call, std::source_location::current())

struct gpu::Device {
  int index = 0;
  cudaStream_t stream = nullptr;       // all computing
  cudaStream_t copy_stream = nullptr;  // batches on their way in
  int multiprocessors = 1;
  int compute_capability = 0;  // 90 for 9.0
  std::shared_ptr<void> gemm;  // plans of matrix products, see gemm.h
  /// Called a few times a second while the host waits for an event: a communicator's, which looks after the
  /// other ranks. What it throws ends the wait. Empty: nobody asks.
  std::function<void()> while_waiting;

  explicit Device(int index);
  ~Device();
  Device(const Device&) = delete;
};

struct Launch {
  dim3 grid, block;
  size_t shared = 0;  // bytes of dynamic shared memory, up to 227 KiB
  std::source_location where = std::source_location::current();
};

/// What the parameters of a kernel may take on every architecture and driver; newer ones allow 32,764 bytes.
inline constexpr size_t kMostParameterBytes = 4096;

/// Enqueues a kernel on the context's stream; an empty grid is no work. Arguments are converted to the
/// kernel's parameter types.
template <typename... Parameters, typename... Arguments>
void launch(const Context& ctx, const Launch& how, void (*kernel)(Parameters...), Arguments&&... arguments) {
  static_assert((size_t{0} + ... + sizeof(Parameters)) <= kMostParameterBytes);
  if (how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0) return;
#ifdef __CUDACC__
  if (how.shared > 32 * 1024)  // 48 KiB come unasked, but static shared memory is among them
    cuda_check(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(how.shared)),
        "cudaFuncSetAttribute", how.where);
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared;
  config.stream = ctx.device->stream;
  cuda_check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "launch", how.where);
#else
  const auto work = [how, kernel,
                     parameters = std::tuple<Parameters...>(static_cast<Parameters>(arguments)...)] {
    cuda_on_cpu::run(
        how.grid, how.block, how.shared, [&] { std::apply(kernel, parameters); },
        reinterpret_cast<const void*>(kernel));
  };
  cuda_check(cuda_on_cpu::enqueue("launch", ctx.device->stream, work), "launch", how.where);
#endif
}

/// Blocks of `block` threads that cover n elements, one each.
inline unsigned blocks_for(int64_t n, int64_t block) {
  return static_cast<unsigned>((n + block - 1) / block);
}

/// The type that a dtype is stored as in kernels.
template <typename T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, bf16>)
    return DType::bf16;
  else if constexpr (std::is_same_v<T, int32_t>)
    return DType::i32;
  else if constexpr (std::is_same_v<T, double>)
    return DType::f64;
  else
    return DType::f32;
}
/// The tensor's memory as T*; null when it is absent; throws ShapeError when it has another dtype.
template <typename T>
T* data_of(const Tensor& tensor) {
  if (tensor && tensor.dtype != dtype_of<T>())
    throw ShapeError("tensor " + tensor.str() + " used as " + dtype_name(dtype_of<T>()));
  return static_cast<T*>(tensor.data);
}

/// Calls body(float{}) or body(bf16{}): turns the dtype of a tensor into a template argument.
template <typename Body>
void for_float_type(DType dtype, Body&& body) {
  if (dtype == DType::bf16) return body(bf16{});
  if (dtype == DType::f32) return body(float{});
  throw ShapeError(std::string("an operation got ") + dtype_name(dtype) + ", need f32 or bf16");
}

/// The same for operations that compute in float64 too: body(double{}) as well.
template <typename Body>
void for_any_float(DType dtype, Body&& body) {
  if (dtype == DType::f64) return body(double{});
  for_float_type(dtype, body);
}

/// True when all of these may be read 16 bytes at a time, in rows of `cols` elements of T.
template <typename T, typename... Pointers>
bool can_vectorize(int64_t cols, const Pointers*... pointers) {
  return cols % (16 / int64_t{sizeof(T)}) == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// ----------------------------------------------------------------------------------------------- device side

inline constexpr unsigned kFullMask = 0xffffffffu;
inline constexpr int kWarpSize = 32;

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(bf16 x) {
  return __bfloat162float(x);
}
/// Rounds to nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>)
    return __float2bfloat16_rn(x);
  else
    return x;
}

/// What values of T are computed in: float64 for float64, else float32.
template <typename T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <typename T>
__device__ __forceinline__ Real<T> to_real(T x) {
  if constexpr (std::is_same_v<T, double>)
    return x;
  else
    return to_float(x);
}
/// Rounds to bf16 to nearest, ties to even; the others stay what they are.
template <typename T>
__device__ __forceinline__ T from_real(Real<T> x) {
  if constexpr (std::is_same_v<T, double>)
    return x;
  else
    return from_float<T>(x);
}

/// N values of T that move as one access of N * sizeof(T) bytes, and must be aligned to that.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};
/// As many values of T as fill 16 bytes.
template <typename T>
inline constexpr int kPackSize = 16 / static_cast<int>(sizeof(T));

/// Memory that is read once, or written and not read again soon: past the caches (ld.cs, st.cs).
template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load_streaming(const T* from) {
  Pack<T, N> pack;
  if constexpr (sizeof(pack) == 16) {
    *reinterpret_cast<int4*>(&pack) = __ldcs(reinterpret_cast<const int4*>(from));
  } else {
    pack = *reinterpret_cast<const Pack<T, N>*>(from);
  }
  return pack;
}
template <typename T, int N>
__device__ __forceinline__ void store_streaming(T* to, const Pack<T, N>& pack) {
  if constexpr (sizeof(pack) == 16) {
    __stcs(reinterpret_cast<int4*>(to), *reinterpret_cast<const int4*>(&pack));
  } else {
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
  }
}
template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}
template <typename T, int N>
__device__ __forceinline__ void store(T* to, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

/// Sum over the warp, the same bits in every lane (butterfly, fixed order). All 32 lanes must call it.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
}
/// Largest over the warp; a NaN is passed over, as fmaxf does.
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    x = fmaxf(x, __shfl_xor_sync(kFullMask, x, offset));
  return x;
}

/// Sum over a block of a multiple of 32 threads, the same bits in every thread. `shared` holds one T per
/// warp; it may be used again right after.
template <typename T>
__device__ __forceinline__ T block_sum(T x, T* shared) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize,
            lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  x = warp_sum(x);
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  T sum = shared[0];
  for (int i = 1; i < warps; ++i) sum += shared[i];
  __syncthreads();
  return sum;
}
