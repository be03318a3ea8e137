// How many matrices of a batch an iteration takes at a time.
#pragma once

#include <algorithm>

#include "model/kernels/context.h"

/// For matrices that need `bytes` of scratch each: as many as stay in the caches of a CPU together, or
/// `least`; all of a model's on a GPU, which one small matrix leaves idle.
inline int64_t at_once(const Context& ctx, int64_t bytes, int64_t batch, int64_t least = 1) {
  const int64_t most = std::max<int64_t>(batch, 1);
  const int64_t together = ctx.where == Where::cpu ? int64_t{16} << 20 : int64_t{1} << 30;
  return std::clamp<int64_t>(together / std::max<int64_t>(bytes, 1), std::min(least, most), most);
}
