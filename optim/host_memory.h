// What the functions that call LAPACK share: float64 working memory on the host, and the way into it and
// back.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "model/kernels/context.h"

/// Working memory on the host: scratch on the CPU; on a GPU, whose scratch is out of reach, blocks of its
/// own. Given back with the object.
class HostMemory {
 public:
  explicit HostMemory(Context& ctx) : ctx_(ctx), frame_(ctx.scratch) {}
  double* doubles(int64_t count) {
    if (ctx_.where == Where::cpu) return frame_.doubles(count);
    return blocks_.emplace_back(static_cast<size_t>(count)).data();
  }
  /// LAPACK's integers, in the room of as many doubles.
  int* ints(int64_t count) { return reinterpret_cast<int*>(doubles(count)); }

 private:
  Context& ctx_;
  Scratch::Frame frame_;
  std::vector<std::vector<double>> blocks_;
};

/// to[i] <- element i of `from`, f32 or f64 in host memory. False when one of them is not finite: LAPACK may
/// loop for ever on those.
inline bool load_doubles(double* to, const Tensor& from) {
  const int64_t n = from.size();
  if (from.dtype == DType::f64)
    std::copy_n(from.f64(), n, to);
  else
    std::copy_n(from.f32(), n, to);
  double finite = 0;  // 0 * x is 0, or NaN for anything that is not finite
  for (int64_t i = 0; i < n; ++i) finite += 0.0 * to[i];
  return finite == 0;
}

/// Element i of `to`, f32 or f64 in host memory, <- value(i).
template <typename Value>
void store_doubles(const Tensor& to, Value&& value) {
  if (to.dtype == DType::f64) {
    for (int64_t i = 0; i < to.size(); ++i) to.f64()[i] = value(i);
  } else {
    for (int64_t i = 0; i < to.size(); ++i) to.f32()[i] = static_cast<float>(value(i));
  }
}

inline void store_nan(const Tensor& to) {
  store_doubles(to, [](int64_t) { return std::numeric_limits<double>::quiet_NaN(); });
}
