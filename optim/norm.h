// Norms, and the three questions that each answers (Proposition 1, Table 1 and Propositions 2, 5, 8 of "Old
// Optimizer, New Norm", arXiv 2409.20325):
//
//   norm(W)        how large W is
//   dual_norm(G)   max <G, T> over ||T|| = 1
//   dualize(G)     a T that attains it, so that <G, dualize(G)> = dual_norm(G) and ||dualize(G)|| = 1
//
// For W (out, in) with rows w_i and columns w_j, singular values s, polar factor U V^T, and 1/p + 1/q = 1:
//
// clang-format off
//   name                norm(W)                     dual_norm(G)                    dualize(G)
//   frobenius           ||W||_F                     ||G||_F                         G / ||G||_F
//   rms                 ||w||_2 / sqrt(n)           sqrt(n) ||g||_2                 sqrt(n) g / ||g||_2     (vectors of n)
//   l1-linf             max |W_ij|                  sum |G_ij|                      sign(G)
//   scaled-l1-linf      in max |W_ij|               sum |G_ij| / in                 sign(G) / in      (Scion's head)
//   l2-l2               max s                       sum s  (the nuclear norm)       U V^T
//   rms-rms             sqrt(in / out) max s        sqrt(out / in) sum s            sqrt(out / in) U V^T
//   nuclear             sum s                       max s                           u_1 v_1^T, of rank one
//   spectral-keller     max s / k                   k sum s                         k U V^T,  k = sqrt(max(1, out / in))
//   spectral-moonlight  max s / k                   k sum s                         k U V^T,  k = 0.2 sqrt(max(out, in))
//   l1-lp               max_j ||w_j||_p             sum_j ||g_j||_q                 columns: dual vectors of the p-norm
//   l1-rms              max_j ||w_j||_2 / sqrt(out) sqrt(out) sum_j ||g_j||_2       columns: sqrt(out) g_j / ||g_j||_2
//   lp-linf             max_i ||w_i||_q             sum_i ||g_i||_p                 rows: dual vectors of the q-norm
//   rms-linf            sqrt(in) max_i ||w_i||_2    sum_i ||g_i||_2 / sqrt(in)      rows: g_i / (sqrt(in) ||g_i||_2)
// clang-format on
//
// p is any number in [1, inf], written l1-l2, l1-l1.5, l3-linf, linf-linf (Proposition 8). The dual vector of
// the p-norm at g is sign(g_i) |g_i|^(q-1) / ||g||_q^(q-1): g / ||g||_2 for p = 2, sign(g) for p = inf, one
// entry of sign(g) where |g| is largest for p = 1, the first of equals. l1-linf is its own name: the entries'
// norm, as the formula of l1-lp says, too; l2-l2 is the spectral norm, which belongs to neither family. u_1
// v_1^T is of the largest singular value; when several are equally large, the pair that LAPACK lists first.
// l2 and linf of vectors are frobenius and l1-linf.
//
// "a-b" is the operator norm max ||W x||_b / ||x||_a; RMS is ||x||_2 / sqrt(length).
//
// Shapes: one matrix (out, in), a batch (batch, out, in), or a vector (n) (seen as out = n, in = 1, for
// frobenius, rms and l1-linf). `transposed` says that the storage is (in, out), as embeddings are: the
// paper's column j is storage row j. A zero gradient gives zero, and so does a zero row or column where rows
// or columns count. A NaN in gives NaN out. Sums and singular values are float64, so inputs near 1e-20 work.
// Deterministic. float32 or float64, `out` and `g` the same.
//
// On a GPU norms and dual norms wait for their numbers; dualize only enqueues work, but for what has no
// kernels: singular values and what is made of singular vectors are computed on the host (see on_host).
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "model/kernels/context.h"
#include "optim/polar.h"
#include "optim/update.h"

enum class NormKind : uint8_t {
  frobenius,
  rms,
  l1_linf,
  scaled_l1_linf,
  l2_l2,
  rms_rms,
  nuclear,
  spectral_keller,
  spectral_moonlight,
  l1_lp,
  l1_rms,
  lp_linf,
  rms_linf
};

struct Norm {
  NormKind kind = NormKind::frobenius;
  double p = 2;  // of l1-lp and lp-linf, 1 to infinity; 2 for all others
  bool operator==(const Norm&) const = default;
};

/// Names as in the table above; "l1-lp" and "lp-linf" stand for all their p.
std::span<const char* const> norm_names();
/// "rms-rms", "l1-l1.5"
std::string norm_name(const Norm& norm);
/// The norm of that name; nothing when there is none. Table 1's names are understood, too: l2, linf,
/// spectral.
std::optional<Norm> find_norm(const std::string& name);
/// True for the norms that are a multiple of the largest singular value: their dual vectors are polar
/// factors.
bool is_spectral(const Norm& norm);
/// True for those that are made of singular values.
bool has_singular_values(const Norm& norm);
/// True when every row of storage has a dual vector of its own, the same in a matrix of any number of rows,
/// and the dual norm of the whole is the sum of the rows'.
bool rows_apart(const Norm& norm, bool transposed);
/// True when dualize() computes on the host, so that a GPU waits for it. `polar` as in Dualize.
bool on_host(const Norm& norm, const PolarMethod* polar = nullptr);

/// c with norm = base / c, dual_norm = c base and dualize = c base, where base is the table's row without out
/// and in: sqrt(out / in) for rms-rms.
double norm_scale(const Norm& norm, int64_t out, int64_t in);

/// The norm of every matrix of `w`: `values` has batch entries, or one.
void norms(Context& ctx, const Norm& kind, const Tensor& w, bool transposed, std::span<double> values);
/// The dual norm of every matrix of `g`.
void dual_norms(Context& ctx, const Norm& kind, const Tensor& g, bool transposed, std::span<double> values);
/// The norm of one matrix or vector.
double norm(Context& ctx, const Norm& kind, const Tensor& w, bool transposed = false);
/// The dual norm of one matrix or vector.
double dual_norm(Context& ctx, const Norm& kind, const Tensor& g, bool transposed = false);

/// True when dualize() can move a weight in the same pass over memory.
bool moves(const Norm& norm);

/// The Euclidean lengths that dualize() divides a matrix by, where they take a reading of their own: that of
/// all entries, or those of the columns of storage. (A row is still in the caches when it is divided.)
enum class Lengths : uint8_t { none, whole, columns };
Lengths lengths_of(const Norm& norm, bool transposed);
/// How many there are of one matrix or vector.
int64_t count_of(Lengths lengths, const Shape& shape);
/// Takes them of one matrix or vector `x`; `to` (count_of) has its dtype. Only enqueues work. No more scratch
/// than dualize().
void measure_lengths(Context& ctx, Lengths lengths, const Tensor& to, const Tensor& x);

struct Dualize {
  Tensor out;  // written; may be g. Absent, where a weight is moved: not kept
  Tensor g;    // (out, in), (batch, out, in) or (n)
  Norm norm;
  double radius = 1;                   // of the dual vectors
  bool transposed = false;             // storage is (in, out)
  const PolarMethod* polar = nullptr;  // for the norms of singular values; null: svd
  ApplyTo into = {};                   // the weight that `out` moves, of one matrix; only where moves(norm)
  Tensor lengths = {};                 // what measure_lengths() took of g, one matrix; absent: not yet known
};
/// Replaces every matrix by its dual vector, times the radius.
void dualize(Context& ctx, const Dualize& args);

/// Scratch that norms(), dual_norms() and dualize() take for tensors of this shape and dtype.
int64_t norm_scratch_bytes(const Context& ctx, const Norm& kind, const Shape& shape, DType dtype,
                           const PolarMethod* polar = nullptr);
