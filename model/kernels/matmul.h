// Matrix products.
//
//   matmul          c = alpha op(a) op(b) + bias + beta c          op(a) (M, K), op(b) (K, N), c (M, N), bias
//   (N) batched_matmul  c[i] = alpha op(a[i]) op(b[i]) + beta addend[i]                          for i = 0 ..
//   batch-1
//
// op(x) is x, or x transposed. All is row-major float32. The three products of a linear layer with weight
// w (out, in), input x (B, T, in) and output y (B, T, out):
//
//   forward          y  = x w^T + bias     {.c = y,  .a = x,  .b = w, .bias = bias, .transpose_b = true}
//   input gradient   dx = dy w             {.c = dx, .a = dy, .b = w}
//   weight gradient  dw = dy^T x           {.c = dw, .a = dy, .b = x, .transpose_a = true}, .beta = 1 to
//   accumulate
//
// Aliasing: c overlaps neither a nor b. Deterministic for a given number of threads.
// The CPU half is oneDNN's sgemm; a NaN or infinity in a or b reaches c, but beta = 0 ignores what c held.
#pragma once

#include "model/kernels/context.h"

struct Matmul {
  Tensor c;                  // (..., N), seen as (M, N): tensors of rank > 2 are matrices of rows() by cols()
  Tensor a;                  // (M, K), or (K, M) with transpose_a
  Tensor b;                  // (K, N), or (N, K) with transpose_b
  Tensor bias = {};          // (N), added to every row; absent: none
  bool transpose_a = false;  // use a^T
  bool transpose_b = false;  // use b^T
  float alpha = 1;           // scales the product, not the bias
  float beta = 0;            // how much of the old c is kept
};

struct BatchedMatmul {
  Tensor c;                  // (batch, M, N)
  Tensor a;                  // (batch, M, K), or (batch, K, M) with transpose_a
  Tensor b;                  // (batch, K, N), or (batch, N, K) with transpose_b
  Tensor addend = {};        // (batch, M, N), what beta scales; may alias a or b; absent: the old c
  bool transpose_a = false;  // use a[i]^T
  bool transpose_b = false;  // use b[i]^T
  float alpha = 1;           // scales the products
  float beta = 0;            // scales the addend
  bool symmetric = false;  // the caller promises that every c[i] is symmetric (x x^T, or a polynomial of it):
                           // only one triangle is computed, the other mirrored, and c is exactly symmetric
};

/// 2 M N K; of symmetric products too, so that their rate can pass the machine's.
inline Work work(const Matmul& args) {
  const int64_t K = args.transpose_a ? args.a.rows() : args.a.cols();
  return {.flops = 2.0 * args.c.size() * K,
          .bytes = 1.0 * (args.a.bytes() + args.b.bytes() + args.c.bytes())};
}
inline Work work(const BatchedMatmul& args) {
  const int64_t K = args.a.shape[args.transpose_a ? 1 : 2];
  return {.flops = 2.0 * args.c.size() * K,
          .bytes = 1.0 * (args.a.bytes() + args.b.bytes() + args.c.bytes())};
}

namespace cpu {
void matmul(Context& ctx, const Matmul& args);
void batched_matmul(Context& ctx, const BatchedMatmul& args);
}  // namespace cpu
namespace gpu {
void matmul(Context& ctx, const Matmul& args);
void batched_matmul(Context& ctx, const BatchedMatmul& args);
}  // namespace gpu

/// Throws ShapeError unless the sizes agree.
void check(const Matmul& args);
void check(const BatchedMatmul& args);

inline void matmul(Context& ctx, const Matmul& args) {
  check(args);
  ON_DEVICE(matmul, ctx, args);
}

inline void batched_matmul(Context& ctx, const BatchedMatmul& args) {
  check(args);
  ON_DEVICE(batched_matmul, ctx, args);
}
