// Softmax and cross-entropy of a chunk of rows, fused: the probabilities never exist in memory.
//
//   loss[n]     = log(sum over v < V of exp(logits[n][v])) - logits[n][target[n]]          nats
//   gradient    = grad_scale (softmax(logits[n])[v] - [v = target[n]])                     for v < V, 0 for v
//   >= V
//
// With with_gradient the gradient overwrites the logits. grad_scale is the derivative of the total loss with
// respect to each row's loss, e.g. 1 / (tokens of the whole batch) for a mean. Large vocabularies are done in
// chunks of rows by the caller (model/gpt.cpp), so that all logits never exist at once either.
//
// Shapes: logits (N, Vp) with Vp >= V; columns V .. Vp-1 are padding, are never read, and get the gradient 0.
// targets (N) int32; losses (N). dtype: logits f32, or on a GPU bf16; losses f32 always. Arithmetic is
// float32, and float64 where the CPU adds up blocks. Errors: a target outside [0, V) is on the CPU a
// ShapeError, raised before anything is written. A GPU cannot raise it: that row's loss becomes NaN, which
// the mean loss shows, and its gradient 0. A NaN or +inf among a row's V logits gives a non-finite loss for
// that row. -inf is a legal logit (probability 0). Deterministic for any number of threads and on any GPU: a
// row belongs to one thread, or block of threads. A GPU reads every logit once and keeps the row in shared
// memory until it writes the gradient, when it fits: up to 115,000 columns of bf16 on an H100 or H200; longer
// rows are read twice. Source: Milakov & Gimelshein, "Online normalizer calculation for softmax", arXiv
// 1805.02867, algorithm 3.
#pragma once

#include "model/kernels/context.h"

struct CrossEntropy {
  Tensor losses;               // (N), written
  Tensor logits;               // (N, Vp), read; overwritten with the gradient on request
  Tensor targets;              // (N), int32
  int64_t V;                   // real classes, <= Vp
  float grad_scale = 0;        // factor of the gradient
  bool with_gradient = false;  // overwrite logits with the gradient
};

/// One reading of the logits, and one writing of the gradient.
inline Work work(const CrossEntropy& args) {
  return {.bytes = (args.with_gradient ? 2.0 : 1.0) * args.logits.bytes()};
}

namespace cpu {
void cross_entropy(Context& ctx, const CrossEntropy& args);
}  // namespace cpu
namespace gpu {
void cross_entropy(Context& ctx, const CrossEntropy& args);
}  // namespace gpu

inline void cross_entropy(Context& ctx, const CrossEntropy& args) {
  const int64_t N = args.logits.rows();
  expect(args.losses.size() == N, "cross_entropy: losses must be (N)");
  expect(args.targets.size() == N, "cross_entropy: targets must be (N)");
  expect(args.V >= 1 && args.V <= args.logits.cols(), "cross_entropy: V must be in [1, columns of logits]");
  ON_DEVICE(cross_entropy, ctx, args);
}
