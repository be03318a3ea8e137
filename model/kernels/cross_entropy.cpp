#include "model/kernels/cross_entropy.h"

#include "model/kernels/simd.h"

namespace {
// Columns done at once: they stay in the first-level cache between the maximum and the sum, and a float32 sum
// of so few terms is exact enough to be added up in float64.
constexpr int64_t kBlock = 1024;

/// The maximum; a NaN is passed over here and reappears in the sum of exponentials.
float block_max(const float* x, int64_t n) {
  float m = -INFINITY;
#pragma omp simd reduction(max : m)
  for (int64_t i = 0; i < n; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

/// What to subtract before taking exponentials. While all logits are -inf any number will do, except -inf,
/// whose difference with itself is NaN.
float finite_or_zero(float m) {
  return m == -INFINITY ? 0.0f : m;
}

/// log of the sum of exponentials of x[0 .. V), reading the row once.
double log_sum_exp(const float* x, int64_t V) {
  float m = -INFINITY;
  double sum = 0;
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const float* block = x + begin;
    const int64_t n = std::min(kBlock, V - begin);
    const float block_m = block_max(block, n);
    if (block_m > m) {
      sum *= std::exp(static_cast<double>(m) - block_m);  // m = -inf at first: 0 * 0
      m = block_m;
    }
    const float shift = finite_or_zero(m);
    float partial = 0;
#pragma omp simd reduction(+ : partial)
    for (int64_t i = 0; i < n; ++i) partial += exp_simd(block[i] - shift);
    sum += partial;
  }
  return m + std::log(sum);
}

/// The same, and x becomes scale (softmax - onehot).
double log_sum_exp_with_gradient(float* x, int64_t V, int64_t target, float scale) {
  // Three passes, but a row fits the second-level cache, and each exponential is taken once.
  const float m = finite_or_zero(block_max(x, V));
  double sum = 0;
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    float* block = x + begin;
    const int64_t n = std::min(kBlock, V - begin);
    float partial = 0;
#pragma omp simd reduction(+ : partial)
    for (int64_t i = 0; i < n; ++i) {
      block[i] = exp_simd(block[i] - m);
      partial += block[i];
    }
    sum += partial;
  }
  const auto factor = static_cast<float>(scale / sum);
#pragma omp simd
  for (int64_t i = 0; i < V; ++i) x[i] *= factor;
  x[target] -= scale;
  return m + std::log(sum);
}
}  // namespace

void cpu::cross_entropy(Context& ctx, const CrossEntropy& args) {
  const int64_t N = args.logits.rows(), Vp = args.logits.cols(), V = args.V;
  const int32_t* targets = args.targets.i32();
  bool legal = true;
  for (int64_t n = 0; n < N; ++n) legal = legal && targets[n] >= 0 && targets[n] < V;
  expect(legal, "cross_entropy: a target is outside [0, V)");

  float* logits = args.logits.f32();
  float* losses = args.losses.f32();
  const float scale = args.grad_scale;
  const bool with_gradient = args.with_gradient;
  parallel_for(ctx, N, 1, [=](int64_t begin, int64_t end, int) {
    for (int64_t n = begin; n < end; ++n) {
      float* row = logits + n * Vp;
      const double of_target = row[targets[n]];  // before the gradient overwrites it
      const double total =
          with_gradient ? log_sum_exp_with_gradient(row, V, targets[n], scale) : log_sum_exp(row, V);
      losses[n] = static_cast<float>(total - of_target);
      if (with_gradient) std::fill(row + V, row + Vp, 0.0f);
    }
  });
}
