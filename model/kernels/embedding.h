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
// Shapes: y, dy (B, T, C); tokens (B, T) int32; wte (V or padded V, C); wpe (positions >= T, C).
// dtype: y, dy, wte, wpe f32, or on a GPU each of them f32 or bf16; dwte, dwpe f32 always. Sums are float32.
// Errors: a token outside [0, rows of wte) is on the CPU a ShapeError, raised before anything is written. A
// GPU cannot raise it: y of that token becomes NaN, which the loss shows, and the backward half skips the
// token. Deterministic: on the CPU for any number of threads (threads share the channels, tokens are added in
// order); on a GPU always (a token's gradients are added in the order of their positions, in groups of fixed
// size).
#pragma once

#include <span>

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
  Tensor order = {};            // (B T), int32: sort_tokens; needed on a GPU, ignored on the CPU
  bool accumulate_wte = false;  // add to dwte instead of overwriting it
  bool accumulate_wpe = false;  // add to dwpe instead of overwriting it
};

/// The indices of `tokens` (B T of them, in host memory) in the order of their token ids below V, equal ones
/// in the order of the indices; those outside [0, V) come last. In time O(B T + V).
void sort_tokens(std::span<const int32_t> tokens, int64_t V, std::span<int32_t> order);

/// Sorted positions that one warp of a GPU adds up: one per lane, whose indices it reads at once.
inline constexpr int64_t kEmbeddingGroup = 32;
/// Scratch that embedding_backward takes for `tokens` = B T: two partial rows per group. None on the CPU.
inline int64_t embedding_backward_scratch_bytes(const Context& ctx, int64_t tokens, int64_t C) {
  if (ctx.where == Where::cpu) return 0;
  return (tokens + kEmbeddingGroup - 1) / kEmbeddingGroup * 2 * C * int64_t{sizeof(float)};
}

/// y and as many rows of wte; wpe stays in a cache.
inline Work work(const EmbeddingForward& args) {
  return {.bytes = 1.0 * args.y.bytes() + 1.0 * args.y.size() * dtype_bytes(args.wte.dtype)};
}
/// dy, and as many rows of dwte read and written; all of dwte once more when it is cleared first.
inline Work work(const EmbeddingBackward& args) {
  return {.bytes = 1.0 * args.dy.bytes() + 2.0 * args.dy.size() * dtype_bytes(args.dwte.dtype) +
                   (args.accumulate_wte ? 0.0 : 1.0 * args.dwte.bytes())};
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
