// The weight that an operation moves in the pass that makes its direction (ApplyTo of update.h): what the
// CUDA halves of such operations share. Only .cu files include this.
#pragma once

#include <cfloat>

#include "model/kernels/cuda.h"
#include "optim/update.h"

/// The numbers that keep an entry from being written when they are NaN, and the first of them, which
/// multiplies the gradient. 1 where there is none.
struct Guards {
  const float *scale, *guard;
};
__device__ __forceinline__ float read_scale(const float* scale) {
  return scale == nullptr ? 1.0f : *scale;
}
/// What state keeps of x: 0 of a denormal (update.h).
__device__ __forceinline__ float kept_of(float x) {
  return fabsf(x) < FLT_MIN ? 0.0f : x;
}
__device__ __forceinline__ double kept_of(double x) {
  return fabs(x) < DBL_MIN ? 0.0 : x;
}
template <typename T, int N>
__device__ __forceinline__ Pack<T, N> kept_of(Pack<T, N> x) {
#pragma unroll
  for (int k = 0; k < N; ++k) x.v[k] = kept_of(x.v[k]);
  return x;
}

__device__ __forceinline__ bool is_nan(float x) {
  return x != x;
}
__device__ __forceinline__ bool forbids(const Guards& guards) {
  return is_nan(read_scale(guards.scale)) || is_nan(read_scale(guards.guard));
}

/// ApplyTo; without w nothing is moved.
template <typename T>
struct Target {
  T* w;
  bf16* copy;
  T step, decay;
  bool cautious;
};

template <typename T>
Target<T> target_of(const ApplyTo& into) {
  return {.w = data_of<T>(into.w),
          .copy = data_of<bf16>(into.copy),
          .step = static_cast<T>(into.step),
          .decay = static_cast<T>(into.decay),
          .cautious = into.cautious};
}

/// a b + c, rounded once.
__device__ __forceinline__ float multiply_add(float a, float b, float c) {
  return fmaf(a, b, c);
}
__device__ __forceinline__ double multiply_add(double a, double b, double c) {
  return fma(a, b, c);
}

/// Before the direction is known, so that all loads of a thread are under way together.
template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load_weights(const Target<T>& to, int64_t i) {
  return to.w != nullptr ? load_streaming<T, N>(to.w + i) : Pack<T, N>{};
}

template <int N, typename T>
__device__ __forceinline__ void move(const Target<T>& to, int64_t i, Pack<T, N> w, const Pack<T, N>& u) {
  if (to.w == nullptr) return;
  Pack<bf16, N> rounded;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const T lost = !to.cautious || u.v[k] * w.v[k] > 0 ? to.decay : T(0);
    // Fused in so many words: left to the compiler, some kernels would be and others not, with other bits.
    w.v[k] = multiply_add(-to.step, u.v[k], multiply_add(-lost, w.v[k], w.v[k]));
    rounded.v[k] = from_float<bf16>(static_cast<float>(w.v[k]));
  }
  store<T, N>(to.w + i, w);
  if (to.copy != nullptr) store<bf16, N>(to.copy + i, rounded);
}
