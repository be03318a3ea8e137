#include "model/kernels/layernorm.h"

#include "model/kernels/simd.h"

namespace {
constexpr int64_t kRowGrain = 4;  // rows; a thread with fewer costs more than it helps

// All passes over a row but the first find it in the first-level cache.
struct Moments {
  float mean, rstd;
};

/// Sums in float64: a chain of float additions would lose digits, and how many by the width of the compiler's
/// vectors.
Moments row_moments(const float* x, int64_t C, float eps) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < C; ++c) sum += x[c];
  const auto mean = static_cast<float>(sum / static_cast<double>(C));
  double squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t c = 0; c < C; ++c) {
    const float deviation = x[c] - mean;
    squares += deviation * deviation;
  }
  const auto variance = static_cast<float>(squares / static_cast<double>(C));
  return {mean, 1.0f / std::sqrt(variance + eps)};
}
}  // namespace

void cpu::layernorm_forward(Context& ctx, const LayernormForward& args) {
  const int64_t rows = args.x.rows(), C = args.x.cols();
  float* x = args.x.f32();
  float* y = args.y.f32();
  float* mean = args.mean.f32();
  float* rstd = args.rstd.f32();
  const float* gain = args.gain.f32();
  const float* bias = args.bias.f32();
  const float* residual = args.residual ? args.residual.f32() : nullptr;
  const float* delta = args.delta ? args.delta.f32() : nullptr;
  const float eps = args.eps;
  parallel_for(ctx, rows, kRowGrain, [=](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = r * C;
      if (delta != nullptr) {
#pragma omp simd
        for (int64_t c = at; c < at + C; ++c) x[c] = residual[c] + delta[c];
      }
      const Moments m = row_moments(x + at, C, eps);
      mean[r] = m.mean;
      rstd[r] = m.rstd;
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) y[at + c] = (x[at + c] - m.mean) * m.rstd * gain[c] + bias[c];
    }
  });
}

namespace {
struct RowGradient {
  float* dx;
  const float *dy, *x, *gain, *dresidual;  // dresidual may be null
  float mean, rstd;
};

/// dx of one row; adds the row's share to dgain and dbias.
void row_backward(const RowGradient& row, float* dgain, float* dbias, int64_t C) {
  float* const dx = row.dx;
  const float *const dy = row.dy, *const x = row.x, *const gain = row.gain, *const dresidual = row.dresidual;
  const float mean = row.mean, rstd = row.rstd;
  float sum_g = 0, sum_gx = 0;  // over channels, of g = gain dy and of g xhat
#pragma omp simd reduction(+ : sum_g, sum_gx)
  for (int64_t c = 0; c < C; ++c) {
    const float g = gain[c] * dy[c];
    sum_g += g;
    sum_gx += g * (x[c] - mean) * rstd;
  }
  const float mean_g = sum_g / static_cast<float>(C);
  const float mean_gx = sum_gx / static_cast<float>(C);
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) {
    const float d = dy[c];  // read before dx, which may be the same memory, is written
    const float xhat = (x[c] - mean) * rstd;
    dgain[c] += d * xhat;
    dbias[c] += d;
    const float from_norm = rstd * (gain[c] * d - mean_g - xhat * mean_gx);
    dx[c] = dresidual != nullptr ? from_norm + dresidual[c] : from_norm;
  }
}
}  // namespace

void cpu::layernorm_backward(Context& ctx, const LayernormBackward& args) {
  const int64_t rows = args.x.rows(), C = args.x.cols();
  const int64_t stride = (C + 15) / 16 * 16;
  Scratch::Frame frame(ctx.scratch);
  float* partials = frame.floats(2 * ctx.threads * stride);  // (threads, 2, stride): dgain and dbias of each
  std::fill(partials, partials + 2 * ctx.threads * stride, 0.0f);
  const float* mean = args.mean.f32();
  const float* rstd = args.rstd.f32();
  const float* dresidual = args.dresidual ? args.dresidual.f32() : nullptr;
  const RowGradient first{args.dx.f32(), args.dy.f32(), args.x.f32(), args.gain.f32(), dresidual, 0, 0};
  parallel_for(ctx, rows, kRowGrain, [=](int64_t begin, int64_t end, int thread) {
    float* dgain = partials + 2 * thread * stride;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = r * C;
      row_backward({first.dx + at, first.dy + at, first.x + at, first.gain,
                    dresidual != nullptr ? dresidual + at : nullptr, mean[r], rstd[r]},
                   dgain, dgain + stride, C);
    }
  });
  float* dgain = args.dgain.f32();
  float* dbias = args.dbias.f32();
  for (int64_t c = 0; c < C; ++c) {
    float gain_sum = args.accumulate ? dgain[c] : 0.0f;
    float bias_sum = args.accumulate ? dbias[c] : 0.0f;
    for (int thread = 0; thread < ctx.threads; ++thread) {
      gain_sum += partials[2 * thread * stride + c];
      bias_sum += partials[(2 * thread + 1) * stride + c];
    }
    dgain[c] = gain_sum;
    dbias[c] = bias_sum;
  }
}
