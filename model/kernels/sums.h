// Sums on the CPU, for the CPU halves of operations: float64 inside, in an order that depends on the number
// of elements alone.
#pragma once

#include <array>

#include "model/kernels/simd.h"

namespace cpu {
/// sum of a[i] b[i].
template <typename T>
double sum_of_products(const T* a, const T* b, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

/// The sum over a whole tensor of n elements, cut into parts by its size alone, which threads share:
/// part_sum(start, count) for each. Sum is a number, or anything that starts as Sum{} and adds with +=.
template <typename Sum = double, typename PartSum>
Sum sum_by_parts(const Context& ctx, int64_t n, const PartSum& part_sum) {
  constexpr int64_t kParts = 256;          // whatever the size: no memory to reserve
  constexpr int64_t kPartGrain = 1024;     // elements; a part is a multiple
  constexpr int64_t kThreadGrain = 16384;  // elements; a thread with fewer costs more than it helps
  const int64_t part = (n / kParts + kPartGrain) / kPartGrain * kPartGrain;
  const int64_t parts = (n + part - 1) / part;
  std::array<Sum, kParts> sums{};
  Sum* out = sums.data();
  parallel_for(ctx, parts, std::max<int64_t>(1, kThreadGrain / part), [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p) out[p] = part_sum(p * part, std::min(part, n - p * part));
  });
  Sum sum{};
  for (int64_t p = 0; p < parts; ++p) sum += out[p];
  return sum;
}
}  // namespace cpu
