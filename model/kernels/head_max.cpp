#include "model/kernels/head_max.h"

#include <cmath>
#include <limits>

#include "model/kernels/simd.h"

namespace cpu {
void head_max(Context& ctx, const HeadMax& a) {
  const int64_t B = a.row_max.shape[0], NH = a.row_max.shape[1], T = a.row_max.shape[2];
  const float* const row_max = a.row_max.f32();
  double* const largest = a.largest.f64();
  parallel_for(ctx, NH, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t h = begin; h < end; ++h) {
      double most = a.accumulate ? largest[h] : -std::numeric_limits<double>::infinity();
      for (int64_t b = 0; b < B; ++b)
        for (int64_t t = 0; t < T; ++t) {
          const double x = row_max[(b * NH + h) * T + t];
          if (x > most || std::isnan(x)) most = x;  // a NaN before stays: no comparison with it holds
        }
      largest[h] = most;
    }
  });
}
}  // namespace cpu
