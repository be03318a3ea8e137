// Matrix products.
//
//   matmul            c = alpha op(a) op(b) + bias + beta c           op(a) (M, K), op(b) (K, N), c (M, N)
//   batched_matmul    c[i] = alpha op(a[i]) op(b[i]) + beta addend[i]           for i = 0 .. batch - 1
//
// op(x) is x, or x transposed. All is row-major. The three products of a linear layer with weight w (out,
// in), input x (B, T, in) and output y (B, T, out), and what may be computed along with each, while the
// product is still in registers or caches (an *epilogue*, one per product):
//
//   forward         y = x w^T + bias           {.c = y, .a = x, .b = w, .bias = bias, .transpose_b = true}
//     and a GELU    h = x w^T + bias, y = gelu(h)                      the same with .pre_gelu = h
//   input gradient  dx = dy w                  {.c = dx, .a = dy, .b = w}
//     GELU before   dx = dy w * gelu'(h)                               the same with .gelu_input = h
//   weight gradient dw = dy^T x                {.c = dw, .a = dy, .b = x, .transpose_a = true}
//     and the bias  dbias = column sums of dy                          the same with .dbias = dbias
//                                              .beta = 1 to add to dw, and to dbias
//
// dtypes: a and b have one, f32 or bf16; c is f32 or theirs (the weight gradient of bf16 activations is f32).
// bias, pre_gelu, gelu_input and addend have the dtype of c; dbias is f32. batched_matmul takes f64 as well,
// for all of its tensors. The CPU half computes in f32 (and f64) only. Sums are f32 (f64), never TF32; what
// is stored as bf16 is rounded once, except that an epilogue which is not fused (gemm.h) reads its input back
// from the bf16 that was stored.
//
// Aliasing: c overlaps no input but the addend; pre_gelu and dbias overlap nothing.
// Deterministic on the CPU for a given number of threads, on a GPU for a given GPU, library and choice of
// algorithms (gemm.h: the choice is kept in a file).
// A NaN or infinity in a or b reaches c, but beta = 0 ignores what c held.
// The CPU half is oneDNN's sgemm (for f64 the dgemm of BLAS), the GPU half cuBLASLt. The f32 of matmul on the
// CPU may take denormal numbers for 0 and make none, and that of batched_matmul where they do not matter.
#pragma once

#include "model/kernels/context.h"

struct Matmul {
  Tensor c;                  // (..., N), seen as (M, N): tensors of rank > 2 are matrices of rows() by cols()
  Tensor a;                  // (M, K), or (K, M) with transpose_a
  Tensor b;                  // (K, N), or (N, K) with transpose_b
  Tensor bias = {};          // (N), added to every row; absent: none
  Tensor pre_gelu = {};      // (M, N), written: the product + bias; c is then gelu of it. beta must be 0
  Tensor gelu_input = {};    // (M, N), read: c = product * gelu'(gelu_input). No bias, beta must be 0
  Tensor dbias = {};         // (M), f32, written: the column sums of a, not scaled; added to the old dbias
                             // unless beta is 0. Needs transpose_a
  bool transpose_a = false;  // use a^T
  bool transpose_b = false;  // use b^T
  float alpha = 1;           // scales the product, not the bias
  float beta = 0;            // how much of the old c is kept
};

struct BatchedMatmul {
  Tensor c;                     // (batch, M, N)
  Tensor a;                     // (batch, M, K), or (batch, K, M) with transpose_a
  Tensor b;                     // (batch, K, N), or (batch, N, K) with transpose_b
  Tensor addend = {};           // (batch, M, N), what beta scales; may alias a or b; absent: the old c
  bool transpose_a = false;     // use a[i]^T
  bool transpose_b = false;     // use b[i]^T
  double alpha = 1;             // scales the products. Rounded to f32 unless all is f64
  double beta = 0;              // scales the addend. Likewise
  bool symmetric = false;       // the caller promises that every c[i] is symmetric (x x^T, or a polynomial of
                                // it). The CPU computes one triangle and mirrors it, so that c is exactly
                                // symmetric; a GPU computes all of c, which is symmetric to rounding only
  bool drop_denormals = false;  // they do not matter: matrices that converge to I or 0 are full of them
};

/// 2 M N K; of symmetric products too, so that their rate can pass the machine's. Epilogues count their own.
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

/// Scratch that a matmul with dbias takes, where a is stored as (K, M). Without dbias: none.
int64_t dbias_scratch_bytes(const Context& ctx, int64_t K, int64_t M);

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
