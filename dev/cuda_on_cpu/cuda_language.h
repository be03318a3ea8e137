// What CUDA adds to C++, for g++: qualifiers, built-in variables, warp intrinsics, barriers, atomics, loads
// and stores with cache hints, device maths. Warp intrinsics and barriers know the line that calls them.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <source_location>
#include <type_traits>

#include "dev/cuda_on_cpu/collectives.h"
#include "dev/cuda_on_cpu/rounding.h"
#include "dev/cuda_on_cpu/small_floats.h"

// ----------------------------------------------------------------------------------------------- qualifiers
#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// One block runs on one OS thread at a time.
#define __shared__ static thread_local
#define DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(::cuda_on_cpu::current_block->shared)

// --------------------------------------------------------------------------------------- built-in variables
#define threadIdx (::cuda_on_cpu::current_thread->index)
#define blockIdx (::cuda_on_cpu::current_block->index)
#define blockDim (::cuda_on_cpu::current_block->size)
#define gridDim (::cuda_on_cpu::current_block->grid)
inline constexpr int warpSize = 32;

// ------------------------------------------------------------------------------------------------- barriers
inline void __syncthreads(std::source_location where = std::source_location::current()) {
  cuda_on_cpu::barrier(0, 0, {"__syncthreads", where});
}
inline int __syncthreads_count(int predicate, std::source_location where = std::source_location::current()) {
  return cuda_on_cpu::barrier(0, 0, {"__syncthreads_count", where}, predicate != 0 ? 1 : 0);
}
inline int __syncthreads_or(int predicate, std::source_location where = std::source_location::current()) {
  return cuda_on_cpu::barrier(0, 0, {"__syncthreads_or", where}, predicate != 0 ? 1 : 0) > 0;
}
inline int __syncthreads_and(int predicate, std::source_location where = std::source_location::current()) {
  return cuda_on_cpu::barrier(0, 0, {"__syncthreads_and", where}, predicate != 0 ? 0 : 1) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, std::source_location where = std::source_location::current()) {
  cuda_on_cpu::meet(mask, {"__syncwarp", where}, cuda_on_cpu::Orders::memory, nullptr, 0);
}
inline void __threadfence() {
  __sync_synchronize();
}
inline void __threadfence_block() {
  __sync_synchronize();
}
inline void __threadfence_system() {
  __sync_synchronize();
}
[[noreturn]] inline void __trap() {
  cuda_on_cpu::fail("__trap");
}

// ------------------------------------------------------------------------------------------ warp intrinsics
namespace cuda_on_cpu {
/// Every shuffle: gives `value`, takes that of lane `source` unless it lies outside of the caller's segment.
template <typename V>
V shuffle(unsigned mask, V value, int source, bool inside, const Operation& operation) {
  static_assert(std::is_trivially_copyable_v<V> && (sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8),
                "shuffles move 2, 4 or 8 bytes");
  const Deposits& all = meet(mask, operation, Orders::nothing, &value, sizeof value);
  if (!inside) return value;
  if ((mask >> source & 1) == 0)
    fail("%s: lane %d reads lane %d, which mask %08x does not name", operation.name, current_thread->lane,
         source, mask);
  return all.of<V>(source);
}
}  // namespace cuda_on_cpu

template <typename V>
V __shfl_sync(unsigned mask, V value, int lane, int width = 32,
              std::source_location where = std::source_location::current()) {
  const int segment = cuda_on_cpu::current_thread->lane & ~(width - 1);
  return cuda_on_cpu::shuffle(mask, value, segment + (lane & (width - 1)), true, {"__shfl_sync", where});
}
template <typename V>
V __shfl_xor_sync(unsigned mask, V value, int with, int width = 32,
                  std::source_location where = std::source_location::current()) {
  const int me = cuda_on_cpu::current_thread->lane, source = me ^ with;
  // Lanes of earlier segments may be read, of later ones not.
  return cuda_on_cpu::shuffle(mask, value, source, source / width <= me / width, {"__shfl_xor_sync", where});
}
template <typename V>
V __shfl_down_sync(unsigned mask, V value, unsigned delta, int width = 32,
                   std::source_location where = std::source_location::current()) {
  const int me = cuda_on_cpu::current_thread->lane;
  const bool inside = static_cast<unsigned>(me & (width - 1)) + delta < static_cast<unsigned>(width);
  return cuda_on_cpu::shuffle(mask, value, me + static_cast<int>(delta), inside, {"__shfl_down_sync", where});
}
template <typename V>
V __shfl_up_sync(unsigned mask, V value, unsigned delta, int width = 32,
                 std::source_location where = std::source_location::current()) {
  const int me = cuda_on_cpu::current_thread->lane;
  const bool inside = static_cast<unsigned>(me & (width - 1)) >= delta;
  return cuda_on_cpu::shuffle(mask, value, me - static_cast<int>(delta), inside, {"__shfl_up_sync", where});
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              std::source_location where = std::source_location::current()) {
  const bool mine = predicate != 0;
  const cuda_on_cpu::Deposits& all =
      cuda_on_cpu::meet(mask, {"__ballot_sync", where}, cuda_on_cpu::Orders::nothing, &mine, sizeof mine);
  unsigned votes = 0;
  for (unsigned left = mask; left != 0; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    votes |= static_cast<unsigned>(all.of<bool>(lane)) << lane;
  }
  return votes;
}
inline int __any_sync(unsigned mask, int predicate,
                      std::source_location where = std::source_location::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      std::source_location where = std::source_location::current()) {
  return __ballot_sync(mask, predicate, where) == mask;
}
template <typename V>
unsigned __match_any_sync(unsigned mask, V value,
                          std::source_location where = std::source_location::current()) {
  const cuda_on_cpu::Deposits& all = cuda_on_cpu::meet(mask, {"__match_any_sync", where},
                                                       cuda_on_cpu::Orders::nothing, &value, sizeof value);
  unsigned equal = 0;
  for (unsigned left = mask; left != 0; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    equal |= static_cast<unsigned>(all.of<V>(lane) == value) << lane;
  }
  return equal;
}

namespace cuda_on_cpu {
template <typename V, typename Combine>
V reduce(unsigned mask, V value, const Operation& operation, Combine combine) {
  static_assert(std::is_integral_v<V> && sizeof(V) == 4, "__reduce_*_sync takes int and unsigned");
  const Deposits& all = meet(mask, operation, Orders::nothing, &value, sizeof value);
  V result = value;
  for (unsigned left = mask & ~(1u << current_thread->lane); left != 0; left &= left - 1)
    result = combine(result, all.of<V>(__builtin_ctz(left)));
  return result;
}
}  // namespace cuda_on_cpu
template <typename V>
V __reduce_add_sync(unsigned mask, V value, std::source_location where = std::source_location::current()) {
  return cuda_on_cpu::reduce(mask, value, {"__reduce_add_sync", where}, [](V a, V b) { return a + b; });
}
template <typename V>
V __reduce_max_sync(unsigned mask, V value, std::source_location where = std::source_location::current()) {
  return cuda_on_cpu::reduce(mask, value, {"__reduce_max_sync", where},
                             [](V a, V b) { return a < b ? b : a; });
}
template <typename V>
V __reduce_min_sync(unsigned mask, V value, std::source_location where = std::source_location::current()) {
  return cuda_on_cpu::reduce(mask, value, {"__reduce_min_sync", where},
                             [](V a, V b) { return b < a ? b : a; });
}

// -------------------------------------------------------------------------------------------------- atomics
namespace cuda_on_cpu {
/// Replaces *at by update(*at), as one step among all OS threads; returns the old value.
template <typename V, typename Update>
V atomic_update(V* at, Update update) {
  check_aligned(at, sizeof(V), "atomic");
  V old, updated;
  __atomic_load(at, &old, __ATOMIC_RELAXED);
  do {
    updated = update(old);
  } while (!__atomic_compare_exchange(at, &old, &updated, true, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
  return old;
}
}  // namespace cuda_on_cpu

template <typename V>
V atomicAdd(V* at, std::type_identity_t<V> value) {
  return cuda_on_cpu::atomic_update(at, [=](V old) { return static_cast<V>(old + value); });
}
template <typename V>
V atomicSub(V* at, std::type_identity_t<V> value) {
  return cuda_on_cpu::atomic_update(at, [=](V old) { return static_cast<V>(old - value); });
}
template <typename V>
V atomicMax(V* at, std::type_identity_t<V> value) {
  return cuda_on_cpu::atomic_update(at, [=](V old) { return old < value ? value : old; });
}
template <typename V>
V atomicMin(V* at, std::type_identity_t<V> value) {
  return cuda_on_cpu::atomic_update(at, [=](V old) { return value < old ? value : old; });
}
template <typename V>
V atomicAnd(V* at, std::type_identity_t<V> value) {
  return cuda_on_cpu::atomic_update(at, [=](V old) { return old & value; });
}
template <typename V>
V atomicOr(V* at, std::type_identity_t<V> value) {
  return cuda_on_cpu::atomic_update(at, [=](V old) { return old | value; });
}
template <typename V>
V atomicXor(V* at, std::type_identity_t<V> value) {
  return cuda_on_cpu::atomic_update(at, [=](V old) { return old ^ value; });
}
template <typename V>
V atomicExch(V* at, std::type_identity_t<V> value) {
  return cuda_on_cpu::atomic_update(at, [=](V) { return value; });
}
/// Counts from 0 to `last`, then from 0 again.
inline unsigned atomicInc(unsigned* at, unsigned last) {
  return cuda_on_cpu::atomic_update(at, [=](unsigned old) { return old >= last ? 0 : old + 1; });
}
template <typename V>
V atomicCAS(V* at, std::type_identity_t<V> expected, std::type_identity_t<V> value) {
  return cuda_on_cpu::atomic_update(at, [=](V old) { return old == expected ? value : old; });
}

// --------------------------------------------------------------------------- loads, stores with cache hints
#define CUDA_ON_CPU_LOAD(name)                           \
  template <typename V>                                  \
  V name(const V* from) {                                \
    cuda_on_cpu::check_aligned(from, alignof(V), #name); \
    return *from;                                        \
  }
#define CUDA_ON_CPU_STORE(name)                        \
  template <typename V>                                \
  void name(V* to, std::type_identity_t<V> value) {    \
    cuda_on_cpu::check_aligned(to, alignof(V), #name); \
    *to = value;                                       \
  }
CUDA_ON_CPU_LOAD(__ldg)
CUDA_ON_CPU_LOAD(__ldca)
CUDA_ON_CPU_LOAD(__ldcg)
CUDA_ON_CPU_LOAD(__ldcs)
CUDA_ON_CPU_LOAD(__ldlu)
CUDA_ON_CPU_LOAD(__ldcv)
CUDA_ON_CPU_STORE(__stwb)
CUDA_ON_CPU_STORE(__stcg)
CUDA_ON_CPU_STORE(__stcs)
CUDA_ON_CPU_STORE(__stwt)
#undef CUDA_ON_CPU_LOAD
#undef CUDA_ON_CPU_STORE

// -------------------------------------------------------------------------------------------- device maths
// CUDA's min and max exist in the global namespace, for mixed types too.
template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using V = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<V>) return static_cast<V>(std::fmin(a, b));
  return static_cast<V>(b) < static_cast<V>(a) ? static_cast<V>(b) : static_cast<V>(a);
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using V = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<V>) return static_cast<V>(std::fmax(a, b));
  return static_cast<V>(a) < static_cast<V>(b) ? static_cast<V>(b) : static_cast<V>(a);
}
using std::isfinite;
using std::isinf;
using std::isnan;

inline float rsqrtf(float x) {
  return cuda_on_cpu::inexact(1.0f / sqrtf(x), x, 2);
}
inline double rsqrt(double x) {
  return 1.0 / sqrt(x);
}
inline float __frsqrt_rn(float x) {
  return static_cast<float>(1.0 / sqrt(static_cast<double>(x)));
}
inline float __frcp_rn(float x) {
  return 1.0f / x;
}
inline float __fsqrt_rn(float x) {
  return sqrtf(x);
}
inline float __fdividef(float a, float b) {
  return cuda_on_cpu::inexact(a / b, b, 2);
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __fmaf_rn(float a, float b, float c) {
  return fmaf(a, b, c);
}
inline float __saturatef(float x) {
  return fminf(fmaxf(x, 0.0f), 1.0f);
}
// Not contracted into fused operations: kernels use these to make sure of that.
inline float __fadd_rn(float a, float b) {
  const volatile float sum = a + b;
  return sum;
}
inline float __fsub_rn(float a, float b) {
  const volatile float difference = a - b;
  return difference;
}
inline float __fmul_rn(float a, float b) {
  const volatile float product = a * b;
  return product;
}
// Functions of float that differ from the C library's, with NVIDIA's bounds of their errors (rounding.h);
// those of double, wrong in its last bits alone, do not. Macros, as the C library has functions of these
// names, and some of the others inside.
namespace cuda_on_cpu {
#define CUDA_ON_CPU_FUNCTION(name, ulps) \
  inline float gpu_##name(float x) {     \
    return inexact(name(x), x, ulps);    \
  }
CUDA_ON_CPU_FUNCTION(expf, 2)
CUDA_ON_CPU_FUNCTION(exp2f, 2)
CUDA_ON_CPU_FUNCTION(exp10f, 2)
CUDA_ON_CPU_FUNCTION(expm1f, 1)
CUDA_ON_CPU_FUNCTION(logf, 1)
CUDA_ON_CPU_FUNCTION(log2f, 1)
CUDA_ON_CPU_FUNCTION(log10f, 2)
CUDA_ON_CPU_FUNCTION(log1pf, 1)
CUDA_ON_CPU_FUNCTION(sinf, 2)
CUDA_ON_CPU_FUNCTION(cosf, 2)
CUDA_ON_CPU_FUNCTION(tanf, 4)
CUDA_ON_CPU_FUNCTION(tanhf, 2)
CUDA_ON_CPU_FUNCTION(erff, 2)
#undef CUDA_ON_CPU_FUNCTION
inline float gpu_powf(float x, float y) {
  return inexact(powf(x, y), x + y, 4);
}
}  // namespace cuda_on_cpu
#define expf(x) ::cuda_on_cpu::gpu_expf(x)
#define exp2f(x) ::cuda_on_cpu::gpu_exp2f(x)
#define exp10f(x) ::cuda_on_cpu::gpu_exp10f(x)
#define expm1f(x) ::cuda_on_cpu::gpu_expm1f(x)
#define logf(x) ::cuda_on_cpu::gpu_logf(x)
#define log2f(x) ::cuda_on_cpu::gpu_log2f(x)
#define log10f(x) ::cuda_on_cpu::gpu_log10f(x)
#define log1pf(x) ::cuda_on_cpu::gpu_log1pf(x)
#define sinf(x) ::cuda_on_cpu::gpu_sinf(x)
#define cosf(x) ::cuda_on_cpu::gpu_cosf(x)
#define tanf(x) ::cuda_on_cpu::gpu_tanf(x)
#define tanhf(x) ::cuda_on_cpu::gpu_tanhf(x)
#define erff(x) ::cuda_on_cpu::gpu_erff(x)
#define powf(x, y) ::cuda_on_cpu::gpu_powf(x, y)
// The intrinsics' errors grow with x; near 0 they are these.
#define __expf(x) expf(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)
#define __powf(x, y) powf(x, y)
#define __sincosf(x, s, c) ::sincosf(x, s, c)

inline int __float_as_int(float x) {
  return std::bit_cast<int>(x);
}
inline unsigned __float_as_uint(float x) {
  return std::bit_cast<unsigned>(x);
}
inline float __int_as_float(int x) {
  return std::bit_cast<float>(x);
}
inline float __uint_as_float(unsigned x) {
  return std::bit_cast<float>(x);
}
inline long long __double_as_longlong(double x) {
  return std::bit_cast<long long>(x);
}
inline double __longlong_as_double(long long x) {
  return std::bit_cast<double>(x);
}
inline int __float2int_rn(float x) {
  return static_cast<int>(lrintf(x));
}
inline int __float2int_rz(float x) {
  return static_cast<int>(x);
}
inline int __float2int_rd(float x) {
  return static_cast<int>(floorf(x));
}
inline float __int2float_rn(int x) {
  return static_cast<float>(x);
}
inline float __uint2float_rn(unsigned x) {
  return static_cast<float>(x);
}
inline float __double2float_rn(double x) {
  return static_cast<float>(x);
}

inline int __popc(unsigned x) {
  return std::popcount(x);
}
inline int __popcll(unsigned long long x) {
  return std::popcount(x);
}
inline int __clz(int x) {
  return std::countl_zero(static_cast<unsigned>(x));
}
inline int __clzll(long long x) {
  return std::countl_zero(static_cast<unsigned long long>(x));
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __ffsll(long long x) {
  return __builtin_ffsll(x);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
