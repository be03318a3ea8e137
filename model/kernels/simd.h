// Threads and vectors for the CPU halves of operations.
//
// Loops are plain C++ that the compiler vectorises under `#pragma omp simd`; reductions say so explicitly, so
// no global fast-math is needed and a NaN stays a NaN. exp is written branch-free here because libm's is a
// call, and a call stops vectorisation. (GELU's tanh is an exp too, see gelu.cpp.)
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "model/kernels/context.h"

/// Splits [0, n) into one contiguous range per thread and calls body(begin, end, thread) on each. The split
/// depends on n, `grain` and ctx.threads only, so results are the same run to run. Ranges begin at multiples
/// of `grain`; few elements use few threads. Not to be nested.
template <typename Body>
void parallel_for(const Context& ctx, int64_t n, int64_t grain, Body&& body) {
  const int64_t chunks = (n + grain - 1) / grain;
  const int64_t threads = std::min<int64_t>(ctx.threads, chunks);
  if (threads <= 1) {
    if (n > 0) body(int64_t{0}, n, 0);
    return;
  }
#pragma omp parallel for num_threads(static_cast <int>(threads)) schedule(static, 1)
  for (int64_t t = 0; t < threads; ++t) {
    const int64_t begin = chunks * t / threads * grain;
    const int64_t end = std::min(n, chunks * (t + 1) / threads * grain);
    body(begin, end, static_cast<int>(t));
  }
}

/// What a pass over memory has to go through, n elements of one array; ranges of it begin at multiples of
/// `grain`.
struct Share {
  int64_t n, grain;
};

/// For passes over memory whose results depend neither on the split nor on the thread: cuts all shares
/// into ranges, which threads take as they come free, and calls body(share, begin, end) on each. Cores that
/// share a machine are not equally fast at every moment: with a fixed half for each, a pass was seen to take
/// a fifth longer. One team of threads for all shares, so that none waits after each; a range is as long
/// as that allows, because memory is slow where one begins. Not to be nested.
template <typename Body>
void deal_out(const Context& ctx, std::span<const Share> all, Body&& body) {
  constexpr int64_t kRangesOfAThread = 8;
  double grains = 0;
  for (const Share& x : all) grains += static_cast<double>(x.n) / static_cast<double>(x.grain);
  const auto threads = static_cast<int>(std::clamp<double>(std::ceil(grains), 1, ctx.threads));
  struct Range {
    int64_t share, begin, end;
  };
  std::vector<Range> ranges;
  const auto per_range =
      static_cast<int64_t>(std::ceil(grains / (threads > 1 ? threads * kRangesOfAThread : 1)));
  for (int64_t i = 0; i < std::ssize(all); ++i)
    for (int64_t begin = 0; begin < all[i].n; begin += per_range * all[i].grain)
      ranges.push_back({i, begin, std::min(all[i].n, begin + per_range * all[i].grain)});
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (const Range& range : ranges) body(range.share, range.begin, range.end);
}
/// The same for one share: body(begin, end).
template <typename Body>
void deal_out(const Context& ctx, int64_t n, int64_t grain, Body&& body) {
  const Share all{n, grain};
  deal_out(ctx, std::span(&all, 1), [&](int64_t, int64_t begin, int64_t end) { body(begin, end); });
}

/// Calls body(float{}) or body(double{}): turns the dtype of a tensor into a template argument.
template <typename Body>
auto for_real_type(DType dtype, Body&& body) {
  if (dtype == DType::f64) return body(double{});
  if (dtype == DType::f32) return body(float{});
  throw ShapeError(std::string("an operation got ") + dtype_name(dtype) + ", need f32 or f64");
}
/// The tensor's values as T*, float or double; null when it is absent; throws ShapeError when it has another
/// dtype.
template <typename T>
T* reals_of(const Tensor& tensor) {
  if (!tensor) return nullptr;
  if constexpr (std::is_same_v<T, double>)
    return tensor.f64();
  else
    return tensor.f32();
}

/// exp(x), relative error below 1e-7 wherever the result is a normal float; 0 below those, +inf above, NaN
/// for NaN. exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2; ln 2 is split in two so that r is
/// exact.
inline float exp_simd(float x) {
  const float shifted =
      x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum rounds to an integer, n, in its last bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;  // minimax polynomial for (exp(r) - 1 - r) / r^2 (Cephes expf)
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float e = (p * (r * r) + r) + 1.0f;
  // Times 2^n: n is added to the exponent field. Outside the two limits that is garbage, which is not used.
  const float y = std::bit_cast<float>(std::bit_cast<uint32_t>(e) + (std::bit_cast<uint32_t>(shifted) << 23));
  constexpr float kLowest = -87.336540f, kHighest = 88.722831f;  // the last floats with a normal result
  const float finite = x < kLowest ? 0.0f : y;
  return x <= kHighest ? finite : x + std::numeric_limits<float>::infinity();  // a NaN goes right, and stays
}
