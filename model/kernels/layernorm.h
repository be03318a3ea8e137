// LayerNorm over the channels of each token, alone or fused with the residual addition before it.
//
//   mean = sum_c x[c] / C                                     per row (b, t)
//   rstd = 1 / sqrt(sum_c (x[c] - mean)^2 / C + eps)
//   xhat = (x - mean) rstd
//   y    = gain xhat + bias
//
// Fused: when residual and delta are given, x = residual + delta is computed and stored first. One pass over
// memory does what two would: the residual stream is the largest traffic of a block outside the matrix
// products.
//
// Backward, with g = gain dy:
//   dx    = rstd (g - mean_c(g) - xhat mean_c(g xhat)) + dresidual
//   dgain = sum over rows of dy xhat,   dbias = sum over rows of dy      (+ the old values when accumulating)
// dresidual is the gradient that arrives along the residual stream, which passes by the norm unchanged.
//
// Shapes: x, y, residual, delta and their gradients (B, T, C); mean, rstd (B, T); gain, bias (C).
// dtype: x, y, residual, delta, dy, dx, dresidual f32, or on a GPU bf16, the same for all; mean, rstd, gain,
// bias, dgain, dbias f32 always. In bf16 the fused sum x is rounded when it is stored, and mean, rstd and y
// are those of the rounded x, which is the one that the backward half sees. Arithmetic is float32.
// Deterministic: on the CPU for a given number of threads, on a GPU always, and the same on all GPUs. The
// mean is taken first and deviations from it are squared, so a large common offset does no harm. Source: Ba,
// Kiros & Hinton, "Layer Normalization", arXiv 1607.06450, equation 4.
#pragma once

#include "model/kernels/context.h"

struct LayernormForward {
  Tensor y, mean, rstd;  // (B, T, C), (B, T), (B, T), written; y may be x when x is not needed again
  Tensor x;              // (B, T, C), read; written when fused, and may then be residual
  Tensor gain, bias;     // (C)
  Tensor residual = {};  // (B, T, C), the stream; together with delta or not at all
  Tensor delta = {};     // (B, T, C), what a block adds to the stream
  float eps = 1e-5f;     // GPT-2's
};

struct LayernormBackward {
  Tensor dx;                // (B, T, C), written; may be dresidual or dy
  Tensor dgain, dbias;      // (C), written
  Tensor dy;                // (B, T, C), read
  Tensor x, mean, rstd;     // of the forward half
  Tensor gain;              // (C), read
  Tensor dresidual = {};    // (B, T, C), added to dx; absent: zero
  bool accumulate = false;  // add to dgain and dbias instead of overwriting them
};

/// Blocks of a GPU that share the rows in layernorm_backward: enough to fill an H200, and independent of the
/// GPU so that results are.
inline constexpr int64_t kLayernormBlocks = 256;

/// Scratch that layernorm_backward takes: one partial dgain and dbias (C) per thread, on a GPU per block.
inline int64_t layernorm_backward_scratch_bytes(const Context& ctx, int64_t C) {
  if (ctx.where == Where::gpu) return 2 * kLayernormBlocks * C * int64_t{sizeof(float)};
  const int64_t row = (C + 15) / 16 * 16;  // whole cache lines, so that threads never share one
  return 2 * ctx.threads * row * int64_t{sizeof(float)};
}

/// x and y; fused, residual and delta too.
inline Work work(const LayernormForward& args) {
  return {.bytes = (args.delta ? 4.0 : 2.0) * args.x.bytes()};
}
/// dy, x and dx; dresidual too where there is one.
inline Work work(const LayernormBackward& args) {
  return {.bytes = (args.dresidual ? 4.0 : 3.0) * args.x.bytes()};
}

namespace cpu {
void layernorm_forward(Context& ctx, const LayernormForward& args);
void layernorm_backward(Context& ctx, const LayernormBackward& args);
}  // namespace cpu
namespace gpu {
void layernorm_forward(Context& ctx, const LayernormForward& args);
void layernorm_backward(Context& ctx, const LayernormBackward& args);
}  // namespace gpu

inline void layernorm_forward(Context& ctx, const LayernormForward& args) {
  const Shape channels{args.x.cols()};
  expect_shape(args.y, args.x.shape, "layernorm_forward: y");
  expect_shape(args.gain, channels, "layernorm_forward: gain");
  expect_shape(args.bias, channels, "layernorm_forward: bias");
  expect(args.mean.size() == args.x.rows(), "layernorm_forward: mean needs one value per row of x");
  expect(args.rstd.size() == args.x.rows(), "layernorm_forward: rstd needs one value per row of x");
  if (args.residual || args.delta) {
    expect_shape(args.residual, args.x.shape, "layernorm_forward: residual");
    expect_shape(args.delta, args.x.shape, "layernorm_forward: delta");
  }
  ON_DEVICE(layernorm_forward, ctx, args);
}

inline void layernorm_backward(Context& ctx, const LayernormBackward& args) {
  const Shape channels{args.x.cols()};
  expect_shape(args.dx, args.x.shape, "layernorm_backward: dx");
  expect_shape(args.dy, args.x.shape, "layernorm_backward: dy");
  expect_shape(args.gain, channels, "layernorm_backward: gain");
  expect_shape(args.dgain, channels, "layernorm_backward: dgain");
  expect_shape(args.dbias, channels, "layernorm_backward: dbias");
  expect(args.mean.size() == args.x.rows(), "layernorm_backward: mean needs one value per row of x");
  expect(args.rstd.size() == args.x.rows(), "layernorm_backward: rstd needs one value per row of x");
  if (args.dresidual) expect_shape(args.dresidual, args.x.shape, "layernorm_backward: dresidual");
  ON_DEVICE(layernorm_backward, ctx, args);
}
