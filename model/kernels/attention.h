// Causal multi-head self-attention, computed in tiles: the T x T matrix of scores never exists.
//
// Per batch entry b and head h, with q, k, v the (T, HS) slices of qkv that belong to h:
//   S_ij   = scale * sum_d q_id k_jd              for j <= i, scale = 1 / sqrt(HS); later keys do not exist
//   lse_i  = log sum_j exp(S_ij)                  what the backward pass needs to rebuild P from S
//   row_max_i = max_j S_ij                        the largest logit, for who watches them; only if asked for
//   P_ij   = exp(S_ij - lse_i)                    softmax over the keys
//   out_id = sum_j P_ij v_jd
// Backward, from dout:
//   D_i    = sum_d dout_id out_id                 equals sum_j P_ij dP_ij, without needing P
//   dP_ij  = sum_d dout_id v_jd
//   dS_ij  = P_ij (dP_ij - D_i)
//   dv_jd  = sum_i P_ij dout_id,   dq_id = scale * sum_j dS_ij k_jd,   dk_jd = scale * sum_i dS_ij q_id
//
// Online softmax: Milakov & Gimelshein, arXiv 1805.02867, algorithm 3. Tiles, lse and D: Dao et al.,
// "FlashAttention", arXiv 2205.14135, algorithms 1 and 4; "FlashAttention-2", arXiv 2307.08691, section 3.
//
// qkv is packed as in GPT-2: channels [0, C) are q, [C, 2C) k, [2C, 3C) v; inside each, head h owns
// [h * HS, (h + 1) * HS). Any T >= 1, any NH that divides C, any HS = C / NH >= 1.
// No argument may overlap another one.
//
// dtypes: on the CPU everything is float32. On a GPU qkv, out and their gradients are all float32 or all
// bf16, and lse and row_max are float32. Scores, exponentials and all sums are float32, and must be finite
// there. Heads of 64 or 128 numbers in bf16, with tensors aligned to 16 bytes, run on tensor cores, which
// take bf16 only: there P is rounded before its products with v and dout, and dS before those with k and q,
// as FlashAttention-2 does. Against exact arithmetic on the same inputs, with u = 2^-8, the relative error of
// one rounding to bf16:
//   |error of out_id| <= u (|out_id| + sum_j P_ij |v_jd|)
//   |error of dv_jd|  <= u (|dv_jd| + sum_i P_ij |dout_id|)
// and over a whole tensor about u / 3, because roundings differ in sign. D, from the rounded out, adds as
// much to dq and dk. All other calls compute in float32 and round results only.
//
// Deterministic: on the CPU, forward gives the same bits for every number of threads, backward for a given
// number; on a GPU, both always.
// While the input is finite, outputs of position i depend, bit for bit, on positions <= i only. A NaN at
// position i of q reaches output i; of k or v, every output from i on, and perhaps some just before i (on a
// GPU up to 63: they share a tile with i). In dout, likewise, it reaches dq of i, and dk and dv up to i and
// perhaps some just after.
#pragma once

#include "model/kernels/context.h"
#include "model/kernels/tensor.h"

struct AttentionForward {
  Tensor out;  // (B, T, C): the heads' results side by side, overwritten
  Tensor lse;  // (B, NH, T): log of the sum of the exponentials of the scaled scores, overwritten
  Tensor qkv;  // (B, T, 3C)
  int64_t NH;  // heads
  /// Queries before this one are not asked for (they are known already, when a text grows token by token):
  /// their rows of out and lse hold anything afterwards. Keys and values of all rows are read.
  int64_t first = 0;
  /// (B, NH, T): row_max, overwritten; absent: not written. The softmax has these numbers anyway: asking for
  /// them changes no bit of out and lse. NaN where a score of the row is NaN. Rows before `first` as above.
  Tensor row_max = {};
};

struct AttentionBackward {
  Tensor dqkv;                 // (B, T, 3C): gradient of qkv, overwritten (not accumulated)
  Tensor dout, out, lse, qkv;  // (B, T, C) twice, (B, NH, T), (B, T, 3C): as the forward pass left them
  int64_t NH;                  // heads
};

namespace cpu {
void attention_forward(Context& ctx, const AttentionForward& a);
void attention_backward(Context& ctx, const AttentionBackward& a);
}  // namespace cpu
namespace gpu {
void attention_forward(Context& ctx, const AttentionForward& a);
void attention_backward(Context& ctx, const AttentionBackward& a);
int64_t attention_scratch_bytes(int64_t B, int64_t T, int64_t NH);
}  // namespace gpu

/// Bytes that either direction takes from ctx.scratch for B sequences of T tokens, or for more but shorter
/// ones. On a CPU some tiles per thread; on a GPU two numbers per head and token for the backward pass.
int64_t attention_scratch_bytes(const Context& ctx, int64_t B, int64_t T, int64_t NH, int64_t HS);

/// Two products of T (T + 1) / 2 pairs with HS numbers, per head; the operands are read and written once.
inline Work work(const AttentionForward& a) {
  const auto T = static_cast<double>(a.qkv.shape[1]);
  return {.flops = 2.0 * static_cast<double>(a.out.size()) * (T + 1),
          .bytes = static_cast<double>(a.qkv.bytes() + a.out.bytes() + a.lse.bytes() +
                                       (a.row_max ? a.row_max.bytes() : 0))};
}
/// Five products.
inline Work work(const AttentionBackward& a) {
  const auto T = static_cast<double>(a.qkv.shape[1]);
  return {.flops = 5.0 * static_cast<double>(a.out.size()) * (T + 1),
          .bytes = static_cast<double>(2 * a.qkv.bytes() + 2 * a.out.bytes() + a.lse.bytes())};
}

/// Checks shared by both directions: qkv (B, T, 3C), out (B, T, C), lse (B, NH, T), NH divides C.
inline void expect_attention_shapes(const Tensor& qkv, const Tensor& out, const Tensor& lse, int64_t NH) {
  expect(qkv.shape.rank() == 3, "attention: qkv must be (B, T, 3C)");
  const int64_t B = qkv.shape[0], T = qkv.shape[1], C = qkv.shape[2] / 3;
  expect(NH >= 1 && C >= 1 && qkv.shape[2] == 3 * C && C % NH == 0,
         "attention: the last dimension of qkv must be 3C with C a multiple of the number of heads");
  expect_shape(qkv, {B, T, 3 * C}, "attention: qkv");
  expect_shape(out, {B, T, C}, "attention: out");
  expect_shape(lse, {B, NH, T}, "attention: lse");
}

/// out, lse = attention(qkv). Throws ShapeError when the shapes do not fit together.
inline void attention_forward(Context& ctx, const AttentionForward& a) {
  expect_attention_shapes(a.qkv, a.out, a.lse, a.NH);
  if (a.row_max) expect_shape(a.row_max, a.lse.shape, "attention: row_max");
  ON_DEVICE(attention_forward, ctx, a);
}

/// dqkv = gradient of qkv, from dout and what the forward pass produced.
inline void attention_backward(Context& ctx, const AttentionBackward& a) {
  expect_attention_shapes(a.qkv, a.out, a.lse, a.NH);
  expect_shape(a.dout, a.out.shape, "attention_backward: dout");
  expect_shape(a.dqkv, a.qkv.shape, "attention_backward: dqkv");
  ON_DEVICE(attention_backward, ctx, a);
}
