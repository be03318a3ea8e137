// bf16, and the two fp8 formats, as cuda_bf16.h and cuda_fp8.h have them: the same names, the same bits.
//
//   bf16  1 sign, 8 exponent, 7 mantissa bits: the upper half of a float
//   e4m3  1, 4, 3; no infinity, largest 448, NaN 0x7f        e5m2  1, 5, 2; largest 57344, inf 0x7c, NaN 0x7f
//
// Conversions to them round to nearest, ties to even.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "dev/cuda_on_cpu/vector_types.h"

// ----------------------------------------------------------------------------------------------------- bf16

namespace cuda_on_cpu {
inline uint16_t float_to_bf16_bits(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // a NaN becomes this one, as on the GPU
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
inline float bf16_bits_to_float(uint16_t bits) {
  return std::bit_cast<float>(uint32_t{bits} << 16);
}
}  // namespace cuda_on_cpu

struct __nv_bfloat16_raw {
  unsigned short x;
};

struct __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;
  __nv_bfloat16(float x) : bits(cuda_on_cpu::float_to_bf16_bits(x)) {}
  explicit __nv_bfloat16(double x) : __nv_bfloat16(static_cast<float>(x)) {}
  explicit __nv_bfloat16(int x) : __nv_bfloat16(static_cast<float>(x)) {}
  __nv_bfloat16(__nv_bfloat16_raw raw) : bits(raw.x) {}
  operator float() const { return cuda_on_cpu::bf16_bits_to_float(bits); }
};

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  return x;
}
inline __nv_bfloat16 __float2bfloat16(float x) {
  return x;
}
inline float __bfloat162float(__nv_bfloat16 x) {
  return x;
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {x, y};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) {
  return {v.x, v.y};
}
inline float2 __bfloat1622float2(__nv_bfloat162 v) {
  return {v.x, v.y};
}
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) {
  return {x, y};
}
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 x) {
  return {x, x};
}
inline float __low2float(__nv_bfloat162 v) {
  return v.x;
}
inline float __high2float(__nv_bfloat162 v) {
  return v.y;
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) {
  return x.bits;
}
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  return __nv_bfloat16_raw{bits};
}

// ------------------------------------------------------------------------------------------------------ fp8

enum __nv_saturation_t { __NV_NOSAT, __NV_SATFINITE };
enum __nv_fp8_interpretation_t { __NV_E4M3, __NV_E5M2 };
using __nv_fp8_storage_t = unsigned char;
using __nv_fp8x2_storage_t = unsigned short;
using __nv_fp8x4_storage_t = unsigned;

namespace cuda_on_cpu {
struct Fp8Format {
  int mantissa_bits, bias;
  float largest;
  uint8_t largest_bits, overflow_bits;  // what overflow gives without saturation
};
inline constexpr Fp8Format kE4M3{3, 7, 448.0f, 0x7e, 0x7f}, kE5M2{2, 15, 57344.0f, 0x7b, 0x7c};
inline constexpr uint8_t kFp8Nan = 0x7f;

inline float fp8_bits_to_float(uint8_t bits, const Fp8Format& format) {
  const int magnitude = bits & 0x7f;
  float value;
  if (magnitude > format.largest_bits) {
    value = magnitude == format.overflow_bits && magnitude != kFp8Nan ? INFINITY : NAN;
  } else {
    const int exponent = magnitude >> format.mantissa_bits;
    const int mantissa = magnitude & ((1 << format.mantissa_bits) - 1);
    const int implicit_one = exponent > 0 ? 1 << format.mantissa_bits : 0;
    value = std::ldexp(static_cast<float>(mantissa + implicit_one),
                       (exponent > 0 ? exponent : 1) - format.bias - format.mantissa_bits);
  }
  return (bits & 0x80) != 0 ? -value : value;
}

inline uint8_t float_to_fp8_bits(float x, const Fp8Format& format, bool saturate) {
  const auto sign = static_cast<uint8_t>(std::signbit(x) ? 0x80 : 0);
  if (std::isnan(x)) return kFp8Nan;
  // In units of the last place, which below the smallest normal number is that number's. rint ties to even.
  const int exponent = x == 0 ? -1000 : std::ilogb(x);
  const int smallest = 1 - format.bias;
  const int ulp = (exponent < smallest ? smallest : exponent) - format.mantissa_bits;
  const float rounded = std::isinf(x) ? INFINITY : std::rint(std::ldexp(std::fabs(x), -ulp));
  if (!(std::ldexp(rounded, ulp) <= format.largest))
    return sign | (saturate ? format.largest_bits : format.overflow_bits);
  // The encoding counts units: one binade up is 2^mantissa_bits more. A carry into the next binade adds up
  // too.
  const int binade = ulp + format.mantissa_bits - smallest;
  return sign | static_cast<uint8_t>(static_cast<int>(rounded) + (binade << format.mantissa_bits));
}

inline const Fp8Format& fp8_format(__nv_fp8_interpretation_t kind) {
  return kind == __NV_E4M3 ? kE4M3 : kE5M2;
}
}  // namespace cuda_on_cpu

inline __nv_fp8_storage_t __nv_cvt_float_to_fp8(float x, __nv_saturation_t saturate,
                                                __nv_fp8_interpretation_t kind) {
  return cuda_on_cpu::float_to_fp8_bits(x, cuda_on_cpu::fp8_format(kind), saturate == __NV_SATFINITE);
}
inline __nv_fp8x2_storage_t __nv_cvt_float2_to_fp8x2(float2 v, __nv_saturation_t saturate,
                                                     __nv_fp8_interpretation_t kind) {
  return static_cast<__nv_fp8x2_storage_t>(__nv_cvt_float_to_fp8(v.x, saturate, kind) |
                                           __nv_cvt_float_to_fp8(v.y, saturate, kind) << 8);
}

namespace cuda_on_cpu {
template <__nv_fp8_interpretation_t kind>
struct Fp8 {
  __nv_fp8_storage_t __x;
  Fp8() = default;
  explicit Fp8(float x) : __x(__nv_cvt_float_to_fp8(x, __NV_SATFINITE, kind)) {}
  explicit operator float() const { return fp8_bits_to_float(__x, fp8_format(kind)); }
};
}  // namespace cuda_on_cpu
using __nv_fp8_e4m3 = cuda_on_cpu::Fp8<__NV_E4M3>;
using __nv_fp8_e5m2 = cuda_on_cpu::Fp8<__NV_E5M2>;
