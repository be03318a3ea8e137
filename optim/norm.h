// Norms, and the three questions that each answers (Proposition 1, Table 1 and Propositions 2, 5, 8 of "Old
// Optimizer, New Norm", arXiv 2409.20325):
//
//   norm(W)        how large W is
//   dual_norm(G)   max <G, T> over ||T|| = 1
//   dualize(G)     a T that attains it, so that <G, dualize(G)> = dual_norm(G) and ||dualize(G)|| = 1
//
// For W (out, in) with rows w_i and columns w_j, singular values s, polar factor U V^T:
//
//   name            norm(W)                          dual_norm(G)                     dualize(G)
//   frobenius       ||W||_F                          ||G||_F                          G / ||G||_F
//   rms             ||w||_2 / sqrt(n)                sqrt(n) ||g||_2                  sqrt(n) g / ||g||_2
//   (vectors of n) l1-linf         max |W_ij|                       sum |G_ij|                       sign(G)
//   scaled-l1-linf  in max |W_ij|                    sum |G_ij| / in                  sign(G) / in (Scion's
//   head) l2-l2           max s                            sum s                            U V^T rms-rms
//   sqrt(in / out) max s             sqrt(out / in) sum s             sqrt(out / in) U V^T l1-l2 max_j
//   ||w_j||_2                  sum_j ||g_j||_2                  columns g_j / ||g_j||_2 l1-rms          max_j
//   ||w_j||_2 / sqrt(out)      sqrt(out) sum_j ||g_j||_2        columns sqrt(out) g_j / ||g_j||_2 l2-linf
//   max_i ||w_i||_2                  sum_i ||g_i||_2                  rows g_i / ||g_i||_2 rms-linf sqrt(in)
//   max_i ||w_i||_2         sum_i ||g_i||_2 / sqrt(in)       rows g_i / (sqrt(in) ||g_i||_2) l1-l1 max_j
//   sum_i |W_ij|               sum_j max_i |G_ij|               columns: sign at the largest entry linf-linf
//   max_i sum_j |W_ij|               sum_i max_j |G_ij|               rows: sign at the largest entry
//
// "a-b" is the operator norm max ||W x||_b / ||x||_a; RMS is ||x||_2 / sqrt(length).
//
// Shapes: one matrix (out, in), a batch (batch, out, in), or a vector (n) (seen as out = n, in = 1, for
// frobenius, rms and l1-linf). `transposed` says that the storage is (in, out), as embeddings are: the
// paper's column j is storage row j. A zero gradient gives zero, and so does a zero row or column where rows
// or columns count. A NaN in gives NaN out. Sums and singular values are float64, so inputs near 1e-20 work.
// Deterministic. float32.
//
// On a GPU norms and dual norms wait for their numbers; dualize only enqueues work, but for what has no
// kernels: singular values and polar factors by SVD, l1-l1 and linf-linf are computed on the host.
#pragma once

#include <cstdint>
#include <span>

#include "model/kernels/context.h"
#include "optim/polar.h"

enum class NormKind : uint8_t {
  frobenius,
  rms,
  l1_linf,
  scaled_l1_linf,
  l2_l2,
  rms_rms,
  l1_l2,
  l1_rms,
  l2_linf,
  rms_linf,
  l1_l1,
  linf_linf
};
/// Names as in the table above, in the order of NormKind.
std::span<const char* const> norm_names();
const char* norm_name(NormKind kind);
NormKind norm_kind(const char* name);

/// c with norm = base / c, dual_norm = c base and dualize = c base, where base is the table's row without out
/// and in: sqrt(out / in) for rms-rms.
double norm_scale(NormKind kind, int64_t out, int64_t in);

/// The norm of every matrix of `w`: `values` has batch entries, or one.
void norms(Context& ctx, NormKind kind, const Tensor& w, bool transposed, std::span<double> values);
/// The dual norm of every matrix of `g`.
void dual_norms(Context& ctx, NormKind kind, const Tensor& g, bool transposed, std::span<double> values);
/// The norm of one matrix or vector.
double norm(Context& ctx, NormKind kind, const Tensor& w, bool transposed = false);
/// The dual norm of one matrix or vector.
double dual_norm(Context& ctx, NormKind kind, const Tensor& g, bool transposed = false);

struct Dualize {
  Tensor out;  // written; may be g
  Tensor g;    // (out, in), (batch, out, in) or (n)
  NormKind norm;
  bool transposed = false;               // storage is (in, out)
  PolarMethod polar = PolarMethod::svd;  // for l2-l2 and rms-rms
  int polar_steps = 0;                   // 0: the method's own
};
/// Replaces every matrix by its dual vector.
void dualize(Context& ctx, const Dualize& args);

/// Scratch that norms(), dual_norms() and dualize() take for f32 tensors of this shape.
int64_t norm_scratch_bytes(const Context& ctx, NormKind kind, const Shape& shape,
                           PolarMethod polar = PolarMethod::svd);
