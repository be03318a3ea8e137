// What scalings multiply a value with, one after the other, shared by both devices: x lift scale is factor x
// s, or factor x / s. 1 / s is infinite for a denormal s: then x is lifted first, by a power of two, which
// changes no bits.
#pragma once

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

template <typename T>
struct Multiplier {
  static constexpr T kLift = sizeof(T) == 8 ? T(0x1p600) : T(0x1p100f);
  T lift, scale;
};

/// Of factor x s, or with `divide` of factor x / s, which is 0 where s is.
template <typename T>
HOST_DEVICE inline Multiplier<T> multiplier(T s, T factor, bool divide) {
  if (!divide) return {1, factor * s};
  if (s == T(0)) return {1, 0};
  const T lift = s < 1 / Multiplier<T>::kLift ? Multiplier<T>::kLift : T(1);
  return {lift, factor / (s * lift)};
}
