// How the executor rounds where CUDA leaves it open:
//
//   exact      as the CPU does, so that the two halves of an operation often agree to the last bit
//   gpu:SEED   in some way that a GPU may: functions are wrong by up to what NVIDIA documents (CUDA C++
//              Programming Guide, "Mathematical Functions"), tensor cores drop bits instead of rounding, and
//              the library of matrix products has several algorithms that add in different orders, of which
//              it suggests another one first for other shapes
//
// A test that passes exactly and not so takes rounding for arithmetic, and would fail on a GPU. Rounding is a
// function of operands and SEED alone, as on a GPU, where a kernel run again gives the same bits.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <string>

namespace cuda_on_cpu {

/// "exact" or "gpu:SEED", from now on; returns what held until now. The environment variable
/// CUDA_ON_CPU_ROUNDING sets the first one. Throws std::invalid_argument.
std::string set_rounding(const std::string& how);

/// What SEED becomes; 0 is exact.
uint32_t rounding_seed();

/// A number that looks random, of two.
inline uint32_t mixed(uint32_t a, uint32_t b) {
  uint32_t x = a * 0x9e3779b9u ^ (b + 0x7f4a7c15u) * 0x85ebca6bu;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

/// f(x) of the C library, at most `ulps` units in the last place away from it. 0, 1, infinities and NaN stay,
/// as they do on a GPU in what kernels rely on: exp(0), exp(-inf), log(1).
inline float inexact(float value, float x, int ulps) {
  const uint32_t seed = rounding_seed();
  if (seed == 0 || value == 0 || value == 1 || !std::isfinite(value)) return value;
  const auto range = static_cast<uint32_t>(2 * ulps + 1);
  const int off = static_cast<int>(mixed(std::bit_cast<uint32_t>(x), seed) % range) - ulps;
  const float moved = std::bit_cast<float>(std::bit_cast<int32_t>(value) + off);
  return std::isnormal(value) && std::isnormal(moved) ? moved : value;
}

/// The next float towards zero, where x is none.
inline float chopped(double x) {
  const auto nearest = static_cast<float>(x);
  return std::isinf(nearest) || !(std::fabs(nearest) > std::fabs(x)) ? nearest : std::nextafterf(nearest, 0);
}

/// sums[n] = sum over k of a[k] b[k][n], as one instruction of a tensor core adds them.
template <int K, int N>
void sum_products(float (&sums)[N], const float (&a)[K], const float (&b)[K][N]) {
  if (rounding_seed() == 0) {
    for (float& sum : sums) sum = 0;
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < N; ++n) sums[n] += a[k] * b[k][n];
    return;
  }
  double exact[N] = {};  // products of bf16 are, and their sums but for extreme ones
  for (int k = 0; k < K; ++k)
    for (int n = 0; n < N; ++n) exact[n] += static_cast<double>(a[k]) * b[k][n];
  for (int n = 0; n < N; ++n) sums[n] = chopped(exact[n]);
}
/// What it adds them to.
inline float plus_products(float sum, float products) {
  return rounding_seed() == 0 ? sum + products : chopped(static_cast<double>(sum) + products);
}

}  // namespace cuda_on_cpu
