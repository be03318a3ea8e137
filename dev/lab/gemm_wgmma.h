// A matrix product of our own for Hopper, a candidate for matmul.h: c = alpha a b^T + bias + beta c.
//
// Shapes: a (M, K), b (N, K), c (M, N), any M and N; K a multiple of 8 (rows must be aligned to 16 bytes).
// dtypes: a and b bf16; c f32 or bf16, bias (N) of c's dtype; sums in f32. Deterministic. c overlaps no
// input.
//
// Tiles of 128 x 128 or 128 x 256. A producer thread lets TMA fill a ring of four stages of 64 columns of
// both operands; two warpgroups multiply 64 rows each with wgmma, and keep one product going while they give
// the stage before it back.
//
// Source: the structure is the one of NVIDIA's "warp-specialized" kernels, PTX ISA 8.0, chapters
// "Asynchronous Warpgroup Level Matrix Instructions" and "cp.async.bulk.tensor".
#pragma once

#include "model/kernels/matmul.h"

/// Throws ShapeError for arguments that it cannot do: other transpositions, dtypes, epilogues than bias.
void lab_gemm_wgmma(Context& ctx, const Matmul& args);
