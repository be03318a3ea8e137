#include "model/flops.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "model/kernels/matmul.h"

double train_flops_per_token(const ModelConfig& config, int64_t T) {
  const auto L = static_cast<double>(config.L), C = static_cast<double>(config.C);
  const double weights = 12.0 * L * C * C + static_cast<double>(config.V) * C;
  return 6.0 * weights + 6.0 * L * C * static_cast<double>(T);
}

double measure_peak_flops(Context& ctx) {
  constexpr int64_t kSize = 1024;
  constexpr int kRuns = 6;  // the first ones find cold caches and a sleeping clock
  std::vector<float> memory(3 * kSize * kSize, 1.0f);
  const auto matrix = [&](int i) { return Tensor(memory.data() + i * kSize * kSize, {kSize, kSize}); };
  double best = 0;
  for (int run = 0; run < kRuns; ++run) {
    const auto start = std::chrono::steady_clock::now();
    matmul(ctx, {.c = matrix(0), .a = matrix(1), .b = matrix(2), .transpose_b = true});
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, 2.0 * kSize * kSize * kSize / seconds);
  }
  return best;
}
