// Adam's direction of a few elements, and the weight that it moves (adam_direction of update.h): what the
// CUDA halves of operations that make it share. Only .cu files include this.
#pragma once

#include "model/kernels/chunks.h"
#include "optim/move.cuh"

__device__ __forceinline__ float root_of(float x) {
  return sqrtf(x);
}
__device__ __forceinline__ double root_of(double x) {
  return sqrt(x);
}
__device__ __forceinline__ float size_of(float x) {
  return fabsf(x);
}
__device__ __forceinline__ double size_of(double x) {
  return fabs(x);
}

template <typename T>
struct AdamEntry {
  T *u, *m, *v;
  const T* g;
  int64_t n;
  Guards guards;
  Target<T> into;
  T gain, beta1, beta2, eps, inverse1, inverse2;
  bool wide;
};

template <typename T>
AdamEntry<T> adam_entry(const AdamDirection& a) {
  return {.u = data_of<T>(a.u),
          .m = data_of<T>(a.m),
          .v = data_of<T>(a.v),
          .g = data_of<T>(a.g),
          .n = a.g.size(),
          .guards = {data_of<float>(a.scale), data_of<float>(a.into.guard)},
          .into = target_of<T>(a.into),
          .gain = static_cast<T>(a.gain),
          .beta1 = static_cast<T>(a.beta1),
          .beta2 = static_cast<T>(a.beta2),
          .eps = static_cast<T>(a.eps),
          .inverse1 = T(1) / static_cast<T>(a.correction1),
          .inverse2 = T(1) / static_cast<T>(a.correction2),
          .wide = aligned_for_four(a.u, a.m, a.v, a.g, a.into.w, a.into.copy)};
}

/// Elements i .. i + N - 1, of which g and, where it is moved, w are loaded already; `scale` is read from the
/// guards, which allow it.
template <int N, typename T>
__device__ __forceinline__ void adam_step(const AdamEntry<T>& a, T scale, int64_t i, const Pack<T, N>& g,
                                          const Pack<T, N>& w) {
  Pack<T, N> u, m{}, v{};
  if (a.m != nullptr) m = load_streaming<T, N>(a.m + i);
  if (a.v != nullptr) v = load_streaming<T, N>(a.v + i);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const T x = scale * (a.gain * g.v[k]);
    m.v[k] = a.m != nullptr ? a.beta1 * m.v[k] + (T(1) - a.beta1) * x : x;
    T root = size_of(x);  // not sqrt(x * x), which underflows
    if (a.v != nullptr) {
      v.v[k] = a.beta2 * v.v[k] + (T(1) - a.beta2) * x * x;
      root = root_of(v.v[k] * a.inverse2);
    }
    const T denominator = root + a.eps;
    u.v[k] = denominator == T(0) ? T(0) : m.v[k] * a.inverse1 / denominator;
    m.v[k] = kept_of(m.v[k]);
    v.v[k] = kept_of(v.v[k]);
  }
  if (a.m != nullptr) store_streaming<T, N>(a.m + i, m);
  if (a.v != nullptr) store_streaming<T, N>(a.v + i, v);
  if (a.u != nullptr) store<T, N>(a.u + i, u);
  move<N>(a.into, i, w, u);
}
