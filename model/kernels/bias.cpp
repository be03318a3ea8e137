#include "model/kernels/bias.h"

#include "model/kernels/simd.h"

namespace {
constexpr int64_t kGrain = 16;  // columns: one cache line, so that threads never share one
constexpr int64_t kRows = 4;    // rows added at once: a quarter of the traffic to dbias
}  // namespace

void cpu::bias_backward(Context& ctx, const BiasBackward& args) {
  const int64_t rows = args.dy.rows(), N = args.dy.cols();
  const float* dy = args.dy.f32();
  float* dbias = args.dbias.f32();
  const bool accumulate = args.accumulate;
  parallel_for(ctx, N, kGrain, [=](int64_t begin, int64_t end, int) {
    if (!accumulate) std::fill(dbias + begin, dbias + end, 0.0f);
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows) {
      const float* row = dy + r * N;
#pragma omp simd
      for (int64_t n = begin; n < end; ++n)
        dbias[n] += (row[n] + row[n + N]) + (row[n + 2 * N] + row[n + 3 * N]);
    }
    for (; r < rows; ++r) {
#pragma omp simd
      for (int64_t n = begin; n < end; ++n) dbias[n] += dy[r * N + n];
    }
  });
}
