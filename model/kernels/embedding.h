// Token and position embedding.
//
//   y[b][t] = wte[tokens[b][t]] + wpe[t]
//
// Backward:
//   dwte[v] = sum over (b, t) with tokens[b][t] = v of dy[b][t]        (+ the old dwte when accumulating)
//   dwpe[t] = sum over b of dy[b][t]                                   (+ the old dwpe when accumulating)
// Without accumulation, rows of dwte that no token hit and rows of dwpe past T become zero: the whole
// gradient is defined. With a tied head, the head's gradient is written first and this one is accumulated
// onto it.
//
// Shapes: y, dy (B, T, C); tokens (B, T) int32; wte (V or padded V, C); wpe (positions >= T, C). dtype
// float32. Errors: a token outside [0, rows of wte) is a ShapeError, raised before anything is written.
// Deterministic for any number of threads: threads share the channels, tokens are added in order.
#pragma once

#include "model/kernels/context.h"

struct EmbeddingForward {
  Tensor y;         // (B, T, C), written
  Tensor tokens;    // (B, T), int32
  Tensor wte, wpe;  // (V, C), (positions, C)
};

struct EmbeddingBackward {
  Tensor dwte, dwpe;            // (V, C), (positions, C), written
  Tensor dy;                    // (B, T, C)
  Tensor tokens;                // (B, T), int32
  bool accumulate_wte = false;  // add to dwte instead of overwriting it
  bool accumulate_wpe = false;  // add to dwpe instead of overwriting it
};

/// y and as many rows of wte; wpe stays in a cache.
inline Work work(const EmbeddingForward& args) {
  return {.bytes = 2.0 * args.y.bytes()};
}
/// dy, and as many rows of dwte read and written; all of dwte once more when it is cleared first.
inline Work work(const EmbeddingBackward& args) {
  return {.bytes = 3.0 * args.dy.bytes() + (args.accumulate_wte ? 0.0 : 1.0 * args.dwte.bytes())};
}

namespace cpu {
void embedding_forward(Context& ctx, const EmbeddingForward& args);
void embedding_backward(Context& ctx, const EmbeddingBackward& args);
}  // namespace cpu
namespace gpu {
void embedding_forward(Context& ctx, const EmbeddingForward& args);
void embedding_backward(Context& ctx, const EmbeddingBackward& args);
}  // namespace gpu

inline void embedding_forward(Context& ctx, const EmbeddingForward& args) {
  expect(args.tokens.shape.rank() == 2, "embedding_forward: tokens must be (B, T)");
  const int64_t B = args.tokens.shape[0], T = args.tokens.shape[1], C = args.wte.cols();
  expect_shape(args.y, {B, T, C}, "embedding_forward: y");
  expect(args.wpe.cols() == C && args.wpe.rows() >= T, "embedding_forward: wpe must be (positions >= T, C)");
  ON_DEVICE(embedding_forward, ctx, args);
}

inline void embedding_backward(Context& ctx, const EmbeddingBackward& args) {
  expect(args.tokens.shape.rank() == 2, "embedding_backward: tokens must be (B, T)");
  const int64_t B = args.tokens.shape[0], T = args.tokens.shape[1], C = args.dwte.cols();
  expect_shape(args.dy, {B, T, C}, "embedding_backward: dy");
  expect(args.dwpe.cols() == C && args.dwpe.rows() >= T,
         "embedding_backward: dwpe must be (positions >= T, C)");
  ON_DEVICE(embedding_backward, ctx, args);
}
