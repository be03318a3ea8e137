// Several consecutive values per thread, as float32 whatever their storage: the common part of the kernels
// that memory limits. Only .cu files include this.
#pragma once

#include <cstring>

#include "model/kernels/cuda.h"

template <int N>
struct Floats {
  float v[N];
};

/// The values of a pack. Two of bf16 are one 32-bit number, whose halves are the upper halves of a float
/// each: one instruction a value, where a conversion of each by itself takes up to two.
template <int N, typename T>
__device__ __forceinline__ Floats<N> to_floats(const Pack<T, N>& pack) {
  Floats<N> values;
  if constexpr (std::is_same_v<T, bf16> && N % 2 == 0) {
    uint32_t pairs[N / 2];
    memcpy(pairs, &pack, sizeof pairs);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      values.v[2 * i] = __uint_as_float(pairs[i] << 16);
      values.v[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) values.v[i] = to_float(pack.v[i]);
  }
  return values;
}

/// How loads and stores treat the caches: `stream` is for memory that nobody reads again soon.
enum class Caching { keep, stream };

/// N values of T from memory that is aligned to 16 bytes, or to N * sizeof(T) where that is less. Accesses of
/// 16 bytes.
template <int N, Caching caching = Caching::keep, typename T>
__device__ __forceinline__ Floats<N> load_floats(const T* from) {
  constexpr int kPart = N < kPackSize<T> ? N : kPackSize<T>;
  Floats<N> values;
#pragma unroll
  for (int i = 0; i < N; i += kPart) {
    Pack<T, kPart> part;
    if constexpr (caching == Caching::stream)
      part = load_streaming<T, kPart>(from + i);
    else
      part = load<T, kPart>(from + i);
    const Floats<kPart> converted = to_floats(part);
#pragma unroll
    for (int j = 0; j < kPart; ++j) values.v[i + j] = converted.v[j];
  }
  return values;
}

/// The reverse; rounds when T is bf16.
template <int N, Caching caching = Caching::keep, typename T>
__device__ __forceinline__ void store_floats(T* to, const Floats<N>& values) {
  constexpr int kPart = N < kPackSize<T> ? N : kPackSize<T>;
#pragma unroll
  for (int i = 0; i < N; i += kPart) {
    Pack<T, kPart> part;
#pragma unroll
    for (int j = 0; j < kPart; ++j) part.v[j] = from_float<T>(values.v[i + j]);
    if constexpr (caching == Caching::stream)
      store_streaming<T, kPart>(to + i, part);
    else
      store<T, kPart>(to + i, part);
  }
}

/// Calls body(N) with N a compile-time integer: how many values of T a thread moves at once, 16 bytes of them
/// where sizes and pointers allow (`wide`: see can_vectorize) and one otherwise.
template <typename T, typename Body>
void by_width(bool wide, Body&& body) {
  if (wide) return body(std::integral_constant<int, kPackSize<T>>{});
  body(std::integral_constant<int, 1>{});
}
