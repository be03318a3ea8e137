// Sums on the CPU, for the CPU halves of operations: float64 inside, in an order that depends on the number
// of elements alone.
#pragma once

#include <array>
#include <cmath>

#include "model/kernels/simd.h"

namespace cpu {
/// The sum of term(i) over [0, n). Term i joins the sum of its lane, i modulo kLanes, then the lanes' sums
/// are added in pairs: one sum, even of a whole vector of lanes, would wait for every addition before the
/// next. `read` are the arrays whose elements term(i) reads. They are fetched kAhead elements before that,
/// because some machines by themselves fetch ahead no further than to the end of a page (both in
/// dev/results/rules.md).
template <typename Term, typename... T>
double sum_of(int64_t n, const Term& term, const T*... read) {
  constexpr int kLanes = 32;
  constexpr int64_t kAhead = 1024;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int k = 0; k < kLanes; k += 8) (__builtin_prefetch(read + i + k + kAhead), ...);
#pragma omp simd
    for (int k = 0; k < kLanes; ++k) lanes[k] += term(i + k);
  }
  for (int k = 0; i < n; ++i, ++k) lanes[k] += term(i);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  return lanes[0];
}

/// sum of a[i]^2. Not the one below: a compiler that sees one array widens each element once, and that is
/// half of the work.
template <typename T>
double sum_of_squares(const T* a, int64_t n) {
  return sum_of(
      n,
      [=](int64_t i) {
        const double x = a[i];
        return x * x;
      },
      a);
}

/// sum of |a[i]|.
template <typename T>
double sum_of_sizes(const T* a, int64_t n) {
  return sum_of(
      n, [=](int64_t i) { return std::fabs(static_cast<double>(a[i])); }, a);
}

/// sum of a[i] b[i].
template <typename T>
double sum_of_products(const T* a, const T* b, int64_t n) {
  return sum_of(
      n, [=](int64_t i) { return static_cast<double>(a[i]) * b[i]; }, a, b);
}

/// Rows of a matrix that are longer, in elements, are shared by the threads, which share out shorter ones.
inline constexpr int64_t kLongRow = 64 * 1024;

/// The parts whose sums make up the sum of n elements, cut by n alone: their length in elements.
inline constexpr int64_t kMostParts = 256;  // whatever the size: no memory to reserve
inline int64_t part_of_sum(int64_t n) {
  constexpr int64_t kGrain = 1024;  // elements; a part is a multiple
  return (n / kMostParts + kGrain) / kGrain * kGrain;
}

/// What threads share of it: whole parts, of enough elements that a thread helps.
inline Share share_of_sum(int64_t n) {
  constexpr int64_t kThreadGrain = 16384;  // elements
  const int64_t part = part_of_sum(n);
  return {n, std::max<int64_t>(1, kThreadGrain / part) * part};
}

/// Of n elements, the sums of the parts in [begin, end): part_sum(start, count) for each.
template <typename Sum, typename PartSum>
void add_parts(Sum* sums, int64_t n, int64_t begin, int64_t end, const PartSum& part_sum) {
  const int64_t part = part_of_sum(n);
  for (int64_t start = begin; start < end; start += part)
    sums[start / part] = part_sum(start, std::min(part, end - start));
}

/// The sum over a whole tensor of n elements, by parts which threads share. Sum is a number, or anything that
/// starts as Sum{} and adds with +=.
template <typename Sum = double, typename PartSum>
Sum sum_by_parts(const Context& ctx, int64_t n, const PartSum& part_sum) {
  std::array<Sum, kMostParts> sums{};
  Sum* out = sums.data();
  const Share all = share_of_sum(n);
  deal_out(ctx, n, all.grain, [&](int64_t begin, int64_t end) { add_parts(out, n, begin, end, part_sum); });
  Sum sum{};
  for (const Sum& part : sums) sum += part;
  return sum;
}
}  // namespace cpu
